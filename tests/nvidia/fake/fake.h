/* Shared by the stand-ins: the event log and the GPU that they describe. No GPU has run this. */
#ifndef FAKE_H
#define FAKE_H
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Append a call to the log in cudart.c. Returns 0, which is success in all of CUDA's libraries. */
int fake_record(const char *kind, const char *name, const long long values[10]);
#define RECORD(kind, ...) fake_record(kind, __func__, (long long[10]){__VA_ARGS__})

/* Export a function of this file under more names. C would want the parameters of each, though none is read. */
#define ALIAS(function, names)                                                                                         \
    __asm__(".irp name, " names "\n.globl \\name\n.type \\name, @function\n.set \\name, " #function "\n.endr")

#define HELPER static inline __attribute__((used)) /* kept, since only aliases may use it */

HELPER int succeed(void) { return 0; }

HELPER int new_handle(void **handle) {
    static char *last;
    *handle = __sync_add_and_fetch(&last, 16);
    return 0;
}

HELPER int answer(int *where, int value) {
    *where = value;
    return 0;
}

/* Value `part` of "MAJOR.MINOR" in FAKE_SM, the compute capability; the default is an A100's. */
HELPER int capability(int part) {
    int parts[2] = {8, 0};
    const char *text = getenv("FAKE_SM");
    if (text)
        sscanf(text, "%d.%d", &parts[0], &parts[1]);
    return parts[part];
}

/* FAKE_MEM is the memory in GiB. */
HELPER long long memory_bytes(void) {
    const char *text = getenv("FAKE_MEM");
    return (long long)((text ? atof(text) : 80.0) * (1LL << 30));
}

#define DEVICE_NAME "stand-in (no GPU)" /* so that no report can take it for a measurement */
#define ERROR_TEXT "error of a stand-in"
#endif
