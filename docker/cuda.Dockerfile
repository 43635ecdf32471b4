# Caption folders on an NVIDIA GPU with ONNX Runtime. Never built or run on a machine with a GPU. From the checkout:
#
#     docker build -f docker/cuda.Dockerfile -t engine:cuda .
#     docker run --rm --gpus all -v "$PWD:/data" engine:cuda caption --backend cuda --input photos --out run.csv
FROM python:3.11-slim AS build
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# CUDA's libraries come from pip (the extra `cuda`); the driver comes from the host.
FROM python:3.11-slim
# The wheel of this checkout; pyproject.toml bounds its packages.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python -m pip install --no-cache-dir --find-links /wheels "blip-caption-engine[cuda,dicom]"
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN mkdir -m 1777 /cache
VOLUME /cache
WORKDIR /data
USER 65534:65534
ENTRYPOINT ["engine"]
CMD ["--help"]
