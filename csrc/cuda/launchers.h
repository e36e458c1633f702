// The C interface of the CUDA operators: raw pointers, sizes and a stream; no torch, no CUDA
// header. Each launcher returns a cudaError_t (0 = launched) and does not synchronize.
#pragma once

#include <cstdint>

extern "C" {

enum LlmqatDtype { LLMQAT_FLOAT32 = 0, LLMQAT_BFLOAT16 = 1, LLMQAT_FLOAT16 = 2 };

// The text of a cudaError_t.
const char* llmqat_cuda_error(int error);

// Multiprocessors of the current device.
int llmqat_cuda_multiprocessors(int64_t* count);

// x[rows, columns], a row every row_stride values, to contiguous codes[rows, columns] and
// scale[rows]; all on the current device.
int llmqat_cuda_quantize(const void* x, int dtype, int64_t rows, int64_t columns,
                         int64_t row_stride, int bits, bool bf16_scale, int8_t* codes, float* scale,
                         void* stream);

}  // extern "C"
