/* Stand-in for cuBLAS: products are recorded, not computed. No GPU has run this. */
#include "fake.h"
typedef void *Handle;
typedef const void *Data;
typedef long long Stride;

/* Products in double precision are not recorded: no graph has any. */
ALIAS(succeed,
      "cublasDestroy_v2, cublasSetStream_v2, cublasGetMathMode, cublasSetMathMode, cublasScopy_v2, cublasSscal_v2, "
      "cublasSgeam, cublasSgetrfBatched, cublasSgetriBatched, cublasDgeam, cublasDgemm_v2, cublasDgemmBatched, "
      "cublasDgemmStridedBatched, cublasDgetrfBatched, cublasDgetriBatched");
ALIAS(new_handle, "cublasCreate_v2");

const char *cublasGetStatusName(int) { return ERROR_TEXT; }
const char *cublasGetStatusString(int) { return ERROR_TEXT; }

/* What is recorded of a product: transposed, sizes, batch, type of A, leading dimensions, type of the sums. */
int cublasGemmEx(Handle, int ta, int tb, int m, int n, int k, Data, Data, int type, int lda, Data, int, int ldb, Data,
                 Data, int, int, int sums, int) {
    return RECORD("product", ta, tb, m, n, k, 1, type, lda, ldb, sums);
}

int cublasGemmStridedBatchedEx(Handle, int ta, int tb, int m, int n, int k, Data, Data, int type, int lda, Stride, Data,
                               int, int ldb, Stride, Data, Data, int, int, Stride, int batch, int sums, int) {
    return RECORD("product", ta, tb, m, n, k, batch, type, lda, ldb, sums);
}

int cublasGemmBatchedEx(Handle, int ta, int tb, int m, int n, int k, Data, Data, int type, int lda, Data, int, int ldb,
                        Data, Data, int, int, int batch, int sums, int) {
    return RECORD("product", ta, tb, m, n, k, batch, type, lda, ldb, sums);
}

int cublasSgemm_v2(Handle, int ta, int tb, int m, int n, int k, Data, Data, int lda, Data, int ldb) {
    return RECORD("product", ta, tb, m, n, k, 1, 0, lda, ldb, 0);
}

int cublasSgemmStridedBatched(Handle, int ta, int tb, int m, int n, int k, Data, Data, int lda, Stride, Data, int ldb,
                              Stride, Data, Data, int, Stride, int batch) {
    return RECORD("product", ta, tb, m, n, k, batch, 0, lda, ldb, 0);
}

int cublasSgemmBatched(Handle, int ta, int tb, int m, int n, int k, Data, Data, int lda, Data, int ldb, Data, Data, int,
                       int batch) {
    return RECORD("product", ta, tb, m, n, k, batch, 0, lda, ldb, 0);
}
