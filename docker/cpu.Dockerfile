# Caption folders on a CPU, without torch. From the checkout:
#
#     docker build -f docker/cpu.Dockerfile -t engine:cpu .
#     docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/data" engine:cpu caption --input photos --out run.csv
FROM python:3.11-slim AS build
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
# The wheel of this checkout; pyproject.toml bounds its packages.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python -m pip install --no-cache-dir --find-links /wheels "blip-caption-engine[cpu,dicom]"
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
RUN mkdir -m 1777 /cache
VOLUME /cache
WORKDIR /data
USER 65534:65534
ENTRYPOINT ["engine"]
CMD ["--help"]
