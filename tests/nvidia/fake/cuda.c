/* Stand-in for the driver, libcuda: one device. No GPU has run this. */
#include "fake.h"

/* Values of CUdevice_attribute. */
enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };

ALIAS(succeed, "cuInit, cuTensorMapEncodeTiled");

static int answer_text(const char **where, const char *text) {
    *where = text;
    return 0;
}

int cuDeviceGetCount(int *count) { return answer(count, 1); }
int cuDeviceGet(int *device, int) { return answer(device, 0); }
int cuDriverGetVersion(int *version) { return answer(version, 13000); }
int cuGetErrorString(int, const char **text) { return answer_text(text, ERROR_TEXT); }
int cuGetErrorName(int, const char **text) { return answer_text(text, ERROR_TEXT); }

int cuDeviceGetName(char *name, int size, int) {
    snprintf(name, size, "%s", DEVICE_NAME);
    return 0;
}

int cuDeviceTotalMem_v2(size_t *bytes, int) {
    *bytes = memory_bytes();
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
    case CAPABILITY_MAJOR: return answer(value, capability(0));
    case CAPABILITY_MINOR: return answer(value, capability(1));
    default: return answer(value, 1);
    }
}
