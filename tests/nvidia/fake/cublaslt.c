/* Stand-in for cublasLt: products are recorded, not computed. No GPU has run this. */
#include "fake.h"

/* Of cublasLtMatrixLayoutAttribute_t; the size of cublasLtMatmulHeuristicResult_t. */
enum { LAYOUT_BATCH_COUNT = 5, HEURISTIC_BYTES = 96 };

typedef void *Handle;
typedef const void *Data;
typedef struct {
    int type, batch;
    long long rows, columns, leading;
} Layout;

ALIAS(
    succeed,
    "cublasLtMatmulDescSetAttribute, cublasLtMatmulPreferenceSetAttribute, cublasLtMatmulAlgoConfigSetAttribute,"
    "cublasLtMatmulAlgoInit, cublasLtMatrixTransform, cublasLtMatrixTransformDescCreate,"
    "cublasLtMatrixTransformDescDestroy, cublasLtMatmulDescDestroy, cublasLtMatmulPreferenceDestroy, cublasLtDestroy");
ALIAS(new_handle, "cublasLtCreate, cublasLtMatmulDescCreate, cublasLtMatmulPreferenceCreate");

int cublasLtMatrixLayoutCreate(Layout **layout, int type, unsigned long rows, unsigned long columns,
                               long long leading) {
    *layout = malloc(sizeof(Layout));
    **layout = (Layout){type, 1, rows, columns, leading};
    return 0;
}

int cublasLtMatrixLayoutDestroy(void *layout) {
    free(layout);
    return 0;
}

int cublasLtMatrixLayoutSetAttribute(Layout *layout, int attribute, const void *value, size_t) {
    if (attribute == LAYOUT_BATCH_COUNT)
        layout->batch = *(const int *)value;
    return 0;
}

int cublasLtMatmulAlgoGetHeuristic(Handle, Handle, Layout *a, Layout *, Layout *, Layout *d, Handle, int wanted,
                                   void *results, int *count) {
    memset(results, 0, wanted * HEURISTIC_BYTES);
    *count = 1;
    return RECORD("heuristic", d->rows, d->columns, a->columns);
}

/* Recorded like cuBLAS's products, but whether A and B are transposed is not known; k follows from the sizes. */
int cublasLtMatmul(Handle, Handle, Data, Data, Layout *a, Data, Layout *, Data, Data, Layout *, void *, Layout *d) {
    long long k = a->rows == d->rows ? a->columns : a->rows;
    return RECORD("product", 0, 0, d->rows, d->columns, k, d->batch, a->type, a->leading);
}
