// The kernels of attention_decode, compiled for the CPU.
#include "cuda/attention_decode.cu"

#include "cuda/attention_mma.cu"
#include "cuda/attention_scalar.cu"
