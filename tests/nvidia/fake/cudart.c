/* Stand-in for CUDA's runtime, libcudart: device memory is the host's, copies copy, kernels are recorded and do
   nothing. Streams have no order of their own: every call is done when it returns. No GPU has run this. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <search.h>

#include "fake.h"

typedef cudaError_t Error;
typedef cudaStream_t Stream;
typedef enum cudaMemcpyKind Direction;

/* ---- the event log, read by events.py ---- */

typedef struct {
    const char *kind, *name;
    long long values[10];
} Event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Event *events;
static long event_count, event_capacity;
static int is_recording;
static long long used_bytes, peak_bytes;

int fake_record(const char *kind, const char *name, const long long values[10]) {
    if (!is_recording)
        return 0;
    pthread_mutex_lock(&lock);
    if (event_count == event_capacity) {
        event_capacity = event_capacity ? 2 * event_capacity : 1 << 16;
        events = realloc(events, event_capacity * sizeof(Event));
    }
    Event *event = &events[event_count++];
    event->kind = kind;
    event->name = name;
    memcpy(event->values, values, sizeof event->values);
    pthread_mutex_unlock(&lock);
    return 0;
}

void fake_start(void) {
    event_count = 0;
    is_recording = 1;
}

long fake_stop(const Event **first) {
    is_recording = 0;
    *first = events;
    return event_count;
}

/* The largest memory of the device that was allocated at once. */
long long fake_peak_bytes(void) { return peak_bytes; }

/* ---- memory ---- */

/* Lies before every allocation; its size keeps CUDA's alignment. */
typedef struct {
    size_t magic, size;
    int is_on_device;
    char unused[512 - 2 * sizeof(size_t) - sizeof(int)];
} Block;

/* Small memory is cleared, since ONNX Runtime reads what a kernel should have written there, sizes for example. Larger
   memory takes no space before it is used. */
enum { MAGIC = 0x5AFEB10C, CLEARED_BYTES = 1 << 20 };

static Error allocate(const char *name, void **address, size_t size, int is_on_device) {
    fake_record(is_on_device ? "allocate" : "pin", name, (long long[10]){size});
    pthread_mutex_lock(&lock);
    int fits = !is_on_device || used_bytes + (long long)size <= memory_bytes();
    Block *block = fits ? aligned_alloc(sizeof(Block), sizeof(Block) + (size + 511) / 512 * 512) : NULL;
    if (block && is_on_device) {
        used_bytes += size;
        peak_bytes = used_bytes > peak_bytes ? used_bytes : peak_bytes;
    }
    pthread_mutex_unlock(&lock);
    *address = block ? block + 1 : NULL;
    if (!block)
        return cudaErrorMemoryAllocation;
    *block = (Block){.magic = MAGIC, .size = size, .is_on_device = is_on_device};
    if (size <= CLEARED_BYTES)
        memset(block + 1, 0, size);
    return cudaSuccess;
}

static Error release(const char *name, void *address) {
    fake_record("free", name, (long long[10]){0});
    if (!address)
        return cudaSuccess;
    Block *block = (Block *)address - 1;
    if (block->magic != MAGIC) {
        fprintf(stderr, "%s: %p was not allocated here\n", name, address);
        return cudaErrorInvalidValue;
    }
    pthread_mutex_lock(&lock);
    used_bytes -= block->is_on_device ? block->size : 0;
    pthread_mutex_unlock(&lock);
    block->magic = 0;
    free(block);
    return cudaSuccess;
}

Error cudaMalloc(void **address, size_t size) { return allocate(__func__, address, size, 1); }
Error cudaMallocHost(void **address, size_t size) { return allocate(__func__, address, size, 0); }
Error cudaFree(void *address) { return release(__func__, address); }
ALIAS(cudaMalloc, "cudaMallocFromPoolAsync");
ALIAS(cudaMallocHost, "cudaHostAlloc");
ALIAS(cudaFree, "cudaFreeAsync, cudaFreeHost");

Error cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *total_bytes = memory_bytes();
    *free_bytes = *total_bytes - used_bytes;
    return cudaSuccess;
}

/* FAKE_FAST leaves out copies within the device, whose bytes mean nothing. */
static Error copy(const char *name, void *to, const void *from, size_t size, Direction direction) {
    fake_record("copy", name, (long long[10]){size, direction, 1});
    if (direction != cudaMemcpyDeviceToDevice || !getenv("FAKE_FAST"))
        memmove(to, from, size);
    return cudaSuccess;
}

static Error fill(const char *name, void *target, int value, size_t size) {
    fake_record("fill", name, (long long[10]){size});
    memset(target, value, size);
    return cudaSuccess;
}

Error cudaMemset(void *target, int value, size_t size) { return fill(__func__, target, value, size); }
Error cudaMemsetAsync(void *target, int value, size_t size, Stream) { return fill(__func__, target, value, size); }
Error cudaMemcpy(void *to, const void *from, size_t size, Direction direction) {
    return copy(__func__, to, from, size, direction);
}
Error cudaMemcpyAsync(void *to, const void *from, size_t size, Direction direction, Stream) {
    return copy(__func__, to, from, size, direction);
}
Error cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows,
                        Direction direction, Stream) {
    RECORD("copy", width * rows, direction, rows);
    for (size_t row = 0; row < rows && !(direction == cudaMemcpyDeviceToDevice && getenv("FAKE_FAST")); row++)
        memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}

/* ---- streams, events, graphs, pools ---- */

/* A capture records nothing: what is queued meanwhile is done at once, and a launched graph does nothing. */
ALIAS(succeed,
      "cudaMemcpyFromSymbol, cudaStreamDestroy, cudaStreamBeginCapture, cudaGraphDestroy, cudaGraphExecDestroy, "
      "cudaEventDestroy, cudaEventRecordWithFlags, cudaSetDevice, cudaGetLastError, cudaPeekAtLastError, "
      "cudaFuncSetAttribute, cudaKernelSetAttributeForDevice, cudaMemPoolDestroy, cudaMemPoolSetAttribute, "
      "cudaMemPoolTrimTo, cudaLibraryUnload, __cudaRegisterFatBinaryEnd, __cudaUnregisterFatBinary, "
      "__cudaRegisterVar");

ALIAS(new_handle,
      "cudaStreamCreate, cudaStreamCreateWithFlags, cudaEventCreate, cudaEventCreateWithFlags, cudaMemPoolCreate, "
      "cudaGraphInstantiate, cudaLibraryLoadData");

Error cudaStreamEndCapture(Stream, cudaGraph_t *graph) { return new_handle((void **)graph); }
Error cudaStreamIsCapturing(Stream, enum cudaStreamCaptureStatus *status) { return answer((int *)status, 0); }
Error cudaGraphLaunch(cudaGraphExec_t, Stream) { return RECORD("graph", 0); }
Error cudaStreamSynchronize(Stream stream) { return RECORD("wait", (long long)stream); }
Error cudaDeviceSynchronize(void) { return RECORD("wait", 0); }
Error cudaStreamWaitEvent(Stream, cudaEvent_t, unsigned) { return RECORD("wait", 0); }
Error cudaEventSynchronize(cudaEvent_t) { return RECORD("wait", 0); }
Error cudaEventRecord(cudaEvent_t, Stream) { return RECORD("event", 0); }

Error cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 1;
    return cudaSuccess;
}

Error cudaMemPoolGetAttribute(cudaMemPool_t, enum cudaMemPoolAttr, void *value) {
    *(unsigned long long *)value = 0;
    return cudaSuccess;
}

Error cudaLaunchHostFunc(Stream, cudaHostFn_t function, void *data) {
    function(data);
    return RECORD("callback", 0);
}

/* ---- the device ---- */

enum { MULTIPROCESSORS = 108, SHARED_BYTES = 48 << 10, SHARED_BYTES_ASKED = 163 << 10, SHARED_BYTES_ALL = 164 << 10 };

Error cudaGetDeviceCount(int *count) { return answer(count, 1); }
Error cudaGetDevice(int *device) { return answer(device, 0); }
Error cudaDriverGetVersion(int *version) { return answer(version, 13000); }
Error cudaRuntimeGetVersion(int *version) { return answer(version, 13000); }
const char *cudaGetErrorName(Error) { return ERROR_TEXT; }
const char *cudaGetErrorString(Error error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : ERROR_TEXT;
}

/* The sizes are an A100's, whatever FAKE_SM says. */
Error cudaGetDeviceProperties(struct cudaDeviceProp *properties, int) {
    *properties = (struct cudaDeviceProp){
        .name = DEVICE_NAME,
        .major = capability(0),
        .minor = capability(1),
        .totalGlobalMem = memory_bytes(),
        .sharedMemPerBlock = SHARED_BYTES,
        .sharedMemPerBlockOptin = SHARED_BYTES_ASKED,
        .sharedMemPerMultiprocessor = SHARED_BYTES_ALL,
        .warpSize = 32,
        .maxThreadsPerBlock = 1024,
        .maxThreadsPerMultiProcessor = 2048,
        .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535},
        .multiProcessorCount = MULTIPROCESSORS,
        .l2CacheSize = 40 << 20,
        .memoryPoolsSupported = 1,
    };
    return cudaSuccess;
}

Error cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: return answer(value, capability(0));
    case cudaDevAttrComputeCapabilityMinor: return answer(value, capability(1));
    case cudaDevAttrMultiProcessorCount: return answer(value, MULTIPROCESSORS);
    case cudaDevAttrMaxSharedMemoryPerBlock: return answer(value, SHARED_BYTES);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return answer(value, SHARED_BYTES_ASKED);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return answer(value, SHARED_BYTES_ALL);
    case cudaDevAttrMaxThreadsPerBlock: return answer(value, 1024);
    case cudaDevAttrMaxThreadsPerMultiProcessor: return answer(value, 2048);
    case cudaDevAttrWarpSize: return answer(value, 32);
    case cudaDevAttrMaxGridDimX: return answer(value, 2147483647);
    default: return answer(value, 1); /* most are questions whether something is supported */
    }
}

Error cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *) {
    *attributes = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024,
        .numRegs = 32,
        .maxDynamicSharedSizeBytes = SHARED_BYTES,
        .binaryVersion = 10 * capability(0) + capability(1),
        .ptxVersion = 10 * capability(0) + capability(1),
    };
    return cudaSuccess;
}

Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t, unsigned) {
    return answer(blocks, 2);
}

Error cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    *attributes = (struct cudaPointerAttributes){.type = cudaMemoryTypeDevice, .devicePointer = (void *)address};
    return cudaSuccess;
}

Error cudaGetDriverEntryPointByVersion(const char *, void **function, unsigned, unsigned long long,
                                       enum cudaDriverEntryPointQueryResult *result) {
    *function = (void *)succeed;
    return result ? answer((int *)result, cudaDriverEntryPointSuccess) : cudaSuccess;
}

/* ---- kernels ---- */

typedef struct {
    const void *function; /* of the host: what a launch names */
    const char *name;     /* mangled */
    const void *machine_code;
} Kernel;

static void *kernels; /* a tree: a library registers thousands, before its first launch */

static int compare(const void *a, const void *b) {
    const char *left = ((const Kernel *)a)->function, *right = ((const Kernel *)b)->function;
    return (left > right) - (left < right);
}

typedef struct {
    int magic, version;
    void *machine_code;
} FatBinary;

/* Called for every fat binary (the kernels of one source file, for several GPUs) when a library is loaded. */
void **__cudaRegisterFatBinary(const FatBinary *wrapper) {
    void **handle = malloc(sizeof(void *));
    *handle = wrapper->machine_code;
    return handle;
}

void __cudaRegisterFunction(void **handle, const char *function, char *, const char *name, ...) {
    Kernel *kernel = malloc(sizeof(Kernel));
    *kernel = (Kernel){function, name, *handle};
    tsearch(kernel, &kernels, compare);
}

static int launch(const void *function, dim3 grid, dim3 block, Stream stream) {
    Kernel wanted = {.function = function}, **found = tfind(&wanted, &kernels, compare);
    return fake_record("kernel", found ? (*found)->name : "unknown",
                       (long long[10]){grid.x, grid.y, grid.z, block.x, block.y, block.z, (long long)stream,
                                       found ? (long long)(*found)->machine_code : 0});
}

/* `kernel<<<grid, block>>>()` is compiled into a push, a pop and a launch on one thread. */
static __thread struct {
    dim3 grid, block;
    size_t shared_bytes;
    void *stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared_bytes = shared_bytes;
    pushed.stream = stream;
    return 0;
}

Error __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes, void **stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared_bytes = pushed.shared_bytes;
    *stream = pushed.stream;
    return cudaSuccess;
}

/* A kernel's handle is the host's function, or the name of one that comes from a library that was loaded as bytes. */
Error __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

Error cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t, const char *name) {
    *kernel = (cudaKernel_t)name;
    return cudaSuccess;
}

Error cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **, size_t, Stream stream) {
    return launch(function, grid, block, stream);
}
ALIAS(cudaLaunchKernel, "__cudaLaunchKernel, cudaLaunchCooperativeKernel");
Error cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **) {
    return launch(function, config->gridDim, config->blockDim, config->stream);
}
