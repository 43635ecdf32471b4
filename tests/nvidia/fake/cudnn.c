/* Stand-in for cuDNN. ONNX Runtime asks for all of these functions by name when it loads the library. No GPU has run
   this. */
#include "fake.h"
#include <stdint.h>

enum { TYPE_BACKEND_DESCRIPTOR = 15 }; /* of cudnnBackendAttributeType_t */

ALIAS(succeed,
      "cudnnDestroy, cudnnSetStream, cudnnGetStream, cudnnBackendDestroyDescriptor, cudnnBackendFinalize, "
      "cudnnBackendSetAttribute, cudnnDeriveBNTensorDescriptor, cudnnDestroyActivationDescriptor, "
      "cudnnDestroyConvolutionDescriptor, cudnnDestroyDropoutDescriptor, cudnnDestroyFilterDescriptor, "
      "cudnnDestroyLRNDescriptor, cudnnDestroyPoolingDescriptor, cudnnDestroyRNNDataDescriptor, "
      "cudnnDestroyRNNDescriptor, cudnnDestroyReduceTensorDescriptor, cudnnDestroyTensorDescriptor, "
      "cudnnDropoutGetStatesSize, cudnnFindConvolutionForwardAlgorithmEx, cudnnGetConvolutionForwardWorkspaceSize, "
      "cudnnGetRNNTempSpaceSizes, cudnnGetRNNWeightParams, cudnnGetReductionIndicesSize, "
      "cudnnGetReductionWorkspaceSize, cudnnGetTensorNdDescriptor, cudnnSetActivationDescriptor, "
      "cudnnSetConvolutionGroupCount, cudnnSetConvolutionMathType, cudnnSetConvolutionNdDescriptor, "
      "cudnnSetDropoutDescriptor, cudnnSetFilterNdDescriptor, cudnnSetLRNDescriptor, cudnnSetPoolingNdDescriptor, "
      "cudnnSetRNNDataDescriptor, cudnnSetReduceTensorDescriptor, cudnnSetTensorNdDescriptor");

ALIAS(new_handle, "cudnnCreate, cudnnCreateActivationDescriptor, cudnnCreateConvolutionDescriptor, "
                  "cudnnCreateDropoutDescriptor, cudnnCreateFilterDescriptor, cudnnCreateLRNDescriptor, "
                  "cudnnCreatePoolingDescriptor, cudnnCreateRNNDataDescriptor, cudnnCreateRNNDescriptor, "
                  "cudnnCreateReduceTensorDescriptor, cudnnCreateTensorDescriptor");

int cudnnBackendCreateDescriptor(int, void **descriptor) { return new_handle(descriptor); }
size_t cudnnGetVersion(void) { return 91400; }
const char *cudnnGetErrorString(int) { return ERROR_TEXT; }

void cudnnGetLastErrorString(char *text, size_t size) {
    if (size)
        text[0] = 0;
}

/* Every attribute is one zero. ONNX Runtime finds no plan for a convolution with its bias then, logs that, and executes
   the convolution and AddTensor. A real cuDNN may do both at once. */
int cudnnBackendGetAttribute(void *, int, int type, int64_t wanted, int64_t *count, void *values) {
    if (count)
        *count = 1;
    if (values && wanted > 0 && type != TYPE_BACKEND_DESCRIPTOR)
        memset(values, 0, sizeof(int64_t));
    return 0;
}

int cudnnBackendExecute(void) { return RECORD("cudnn", 0); }
int cudnnAddTensor(void) { return RECORD("cudnn", 0); }
int cudnnConvolutionForward(void) { return RECORD("cudnn", 0); }
int cudnnConvolutionBiasActivationForward(void) { return RECORD("cudnn", 0); }

HELPER int cudnn_other(void) { return RECORD("cudnn", 0); } /* of no graph of ours */
ALIAS(cudnn_other, "cudnnActivationForward, cudnnBatchNormalizationForwardInference, cudnnLRNCrossChannelForward, "
                   "cudnnBatchNormalizationForwardTraining, cudnnPoolingForward, cudnnRNNForward, cudnnReduceTensor, "
                   "cudnnSoftmaxForward");
