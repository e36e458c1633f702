// quantize, dequantize, fake_quantize and the STE mask over rows.
//
// Math:     spec 1-6.
// Shapes:   one row of n values a call; the bindings cut tensors into rows or groups.
// Dtypes:   fp32, bf16, fp16 in and out; int8 codes; fp32 arithmetic and scales.
// Tiling:   none: a row (4 to 44 KiB in LLaMA) stays in L1/L2 between its two passes.
// Cost:     memory-bound. Floor per value: read sizeof(T), write 1 (quantize); read 1, write
//           sizeof(T) (dequantize); read and write sizeof(T) (fake_quantize). At 25 GB/s a core:
//           0.2 ns per fp32 value.
// Numerics: exact. amax is an integer maximum of |x|'s bits: order-free, and Inf and NaN come out
// on
//           top, so that one pass gives both amax and the finite check. No FMA anywhere.
// Edges:    n = 0 gives scale 1; tails: lane masks (AVX-512) or the scalar formula (AVX2).
// Limits:   MXCSR must be at its default (round to nearest, no flush to zero), as torch leaves it.
// Tests:    tests/kernels/test_native.py, tests/kernels/test_quantize.py.
// Bench:    python -m benchmarks.run --op quantize
#include "cpu/rows.h"

#include <bit>
#include <limits>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/magnitude.h"
#include "cpu/vec.h"

namespace llmqat::cpu {

// ---- scalar ----

namespace scalar {
namespace {

template <class T>
uint32_t amax_bits(const T* x, int64_t n, uint32_t amax = 0) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t m = stored_magnitude(x[i]);
    amax = m > amax ? m : amax;
  }
  return amax;
}

template <class T>
void codes(const T* x, int64_t n, float inv, float limit, int8_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = quantize_code(to_float(x[i]), inv, limit);
}

template <class T>
void dequantize(const int8_t* codes, int64_t n, float scale, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(dequantize_code(codes[i], scale));
}

template <class T>
void fake(const T* x, int64_t n, float inv, float limit, float scale, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = from_float<T>(dequantize_code(quantize_code(to_float(x[i]), inv, limit), scale));
  }
}

}  // namespace
}  // namespace scalar

// ---- AVX2 ----

namespace avx2 {
namespace {

template <class T>
LLMQAT_TARGET_AVX2 uint32_t amax_bits(const T* x, int64_t n) {
  constexpr bool wide = std::is_same_v<T, float>;
  constexpr int step = 32 / sizeof(T);
  __m256i top = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    if constexpr (wide) {
      top = _mm256_max_epu32(top, _mm256_and_si256(v, _mm256_set1_epi32(kAbsMask)));
    } else {
      top = _mm256_max_epu16(top, _mm256_and_si256(v, _mm256_set1_epi16(0x7FFF)));
    }
  }
  if constexpr (!wide) {  // 16 halves to 8 words
    const __m256i low = _mm256_and_si256(top, _mm256_set1_epi32(0xFFFF));
    top = _mm256_max_epu32(low, _mm256_srli_epi32(top, 16));
  }
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
  return scalar::amax_bits(x + i, n - i, static_cast<uint32_t>(_mm_cvtsi128_si32(m)));
}

template <class T>
LLMQAT_TARGET_AVX2 inline __m256i code_lanes(const T* x, __m256 inv, __m256 low, __m256 high) {
  const __m256 v = _mm256_mul_ps(load(x), inv);
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, low), high));
}

template <class T>
LLMQAT_TARGET_AVX2 void codes(const T* x, int64_t n, float inv, float limit, int8_t* out) {
  const __m256 vinv = _mm256_set1_ps(inv), low = _mm256_set1_ps(-limit),
               high = _mm256_set1_ps(limit);
  // The two packs interleave 128-bit halves; this puts the groups of four back in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i a = code_lanes(x + i, vinv, low, high);
    const __m256i b = code_lanes(x + i + 8, vinv, low, high);
    const __m256i c = code_lanes(x + i + 16, vinv, low, high);
    const __m256i d = code_lanes(x + i + 24, vinv, low, high);
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm256_permutevar8x32_epi32(bytes, order));
  }
  scalar::codes(x + i, n - i, inv, limit, out + i);
}

template <class T>
LLMQAT_TARGET_AVX2 void dequantize(const int8_t* codes, int64_t n, float scale, T* out) {
  const __m256 vscale = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
    store(out + i, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), vscale));
  }
  scalar::dequantize(codes + i, n - i, scale, out + i);
}

template <class T>
LLMQAT_TARGET_AVX2 void fake(const T* x, int64_t n, float inv, float limit, float scale, T* out) {
  const __m256 vinv = _mm256_set1_ps(inv), low = _mm256_set1_ps(-limit),
               high = _mm256_set1_ps(limit);
  const __m256 vscale = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const __m256 code = _mm256_cvtepi32_ps(code_lanes(x + i, vinv, low, high));
    store(out + i, _mm256_mul_ps(code, vscale));
  }
  scalar::fake(x + i, n - i, inv, limit, scale, out + i);
}

}  // namespace
}  // namespace avx2

// ---- AVX-512 ----

namespace avx512 {
namespace {

template <class T>
LLMQAT_TARGET_AVX512 uint32_t amax_bits(const T* x, int64_t n) {
  __m512i top = _mm512_setzero_si512();
  if constexpr (std::is_same_v<T, float>) {
    const __m512i abs = _mm512_set1_epi32(kAbsMask);
    for (int64_t i = 0; i < n; i += 16) {
      const __m512i v = _mm512_maskz_loadu_epi32(lanes(n - i), x + i);
      top = _mm512_max_epu32(top, _mm512_and_si512(v, abs));
    }
  } else {
    const __m512i abs = _mm512_set1_epi16(0x7FFF);
    for (int64_t i = 0; i < n; i += 32) {
      const __mmask32 m = n - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - i)) - 1;
      const __m512i v = _mm512_maskz_loadu_epi16(m, x + i);
      top = _mm512_max_epu16(top, _mm512_and_si512(v, abs));
    }
    const __m512i low = _mm512_and_si512(top, _mm512_set1_epi32(0xFFFF));
    top = _mm512_max_epu32(low, _mm512_srli_epi32(top, 16));
  }
  return _mm512_reduce_max_epu32(top);
}

template <class T>
LLMQAT_TARGET_AVX512 inline __m512i code_lanes(const T* x, __mmask16 m, __m512 inv, __m512 low,
                                               __m512 high) {
  const __m512 v = _mm512_mul_ps(load(x, m), inv);
  return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(v, low), high));
}

template <class T>
LLMQAT_TARGET_AVX512 void codes(const T* x, int64_t n, float inv, float limit, int8_t* out) {
  const __m512 vinv = _mm512_set1_ps(inv), low = _mm512_set1_ps(-limit),
               high = _mm512_set1_ps(limit);
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 m = lanes(n - i);
    const __m128i bytes = _mm512_cvtepi32_epi8(code_lanes(x + i, m, vinv, low, high));
    _mm_mask_storeu_epi8(out + i, m, bytes);
  }
}

template <class T>
LLMQAT_TARGET_AVX512 void dequantize(const int8_t* codes, int64_t n, float scale, T* out) {
  const __m512 vscale = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 m = lanes(n - i);
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, codes + i));
    store(out + i, m, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), vscale));
  }
}

template <class T>
LLMQAT_TARGET_AVX512 void fake(const T* x, int64_t n, float inv, float limit, float scale, T* out) {
  const __m512 vinv = _mm512_set1_ps(inv), low = _mm512_set1_ps(-limit),
               high = _mm512_set1_ps(limit);
  const __m512 vscale = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 m = lanes(n - i);
    const __m512 code = _mm512_cvtepi32_ps(code_lanes(x + i, m, vinv, low, high));
    store(out + i, m, _mm512_mul_ps(code, vscale));
  }
}

}  // namespace
}  // namespace avx512

// ---- dispatch ----

namespace {

template <class T>
RowScale measure(const T* x, int64_t n, int bits, bool bf16_scale) {
  return row_scale(amax_bits_of_row(x, n), bits, bf16_scale);
}

}  // namespace

template <class T>
uint32_t amax_bits_of_row(const T* x, int64_t n) {
  const Isa isa = current_isa();
  const uint32_t amax = isa == Isa::avx512vnni ? avx512::amax_bits(x, n)
                        : isa == Isa::avx2     ? avx2::amax_bits(x, n)
                                               : scalar::amax_bits(x, n);
  return widen_amax(amax, x);
}

template <class T>
void codes_of_row(const T* x, int64_t n, float inv, int bits, int8_t* codes) {
  const float limit = static_cast<float>(qmax(bits));
  switch (current_isa()) {
    case Isa::avx512vnni: return avx512::codes(x, n, inv, limit, codes);
    case Isa::avx2: return avx2::codes(x, n, inv, limit, codes);
    default: return scalar::codes(x, n, inv, limit, codes);
  }
}

template <class T>
float quantize_row(const T* x, int64_t n, int bits, bool bf16_scale, int8_t* codes) {
  const RowScale row = measure(x, n, bits, bf16_scale);
  if (!row.zero) {
    codes_of_row(x, n, row.inv, bits, codes);
  } else if (n > 0) {
    std::memset(codes, 0, static_cast<size_t>(n));
  }
  return row.scale;
}

template <class T>
void dequantize_row(const int8_t* codes, int64_t n, float scale, T* out) {
  switch (current_isa()) {
    case Isa::avx512vnni: return avx512::dequantize(codes, n, scale, out);
    case Isa::avx2: return avx2::dequantize(codes, n, scale, out);
    default: return scalar::dequantize(codes, n, scale, out);
  }
}

template <class T>
void fake_quantize_row(const T* x, int64_t n, int bits, bool bf16_scale, T* out) {
  const Isa isa = current_isa();
  const RowScale row = measure(x, n, bits, bf16_scale);
  const float limit = static_cast<float>(qmax(bits));
  if (row.zero) {
    const T value = from_float<T>(dequantize_code(0, row.scale));
    for (int64_t i = 0; i < n; ++i) out[i] = value;
  } else if (isa == Isa::avx512vnni) {
    avx512::fake(x, n, row.inv, limit, row.scale, out);
  } else if (isa == Isa::avx2) {
    avx2::fake(x, n, row.inv, limit, row.scale, out);
  } else {
    scalar::fake(x, n, row.inv, limit, row.scale, out);
  }
}

namespace {

// |x| < clip holds exactly where the stored magnitude is below this. Nothing is below 0, so that a
// NaN x, whose magnitude is above Inf's, and a NaN clip stop the gradient.
template <class T>
uint32_t stored_threshold(float clip) {
  if (!(clip > 0.0f)) return 0;
  const T nearest = from_float<T>(clip);
  return stored_magnitude(nearest) + (to_float(nearest) < clip ? 1 : 0);
}

int32_t stored_bits(float v) { return std::bit_cast<int32_t>(v); }
template <class T>
int16_t stored_bits(T v) {
  return static_cast<int16_t>(v.bits);
}

void put_stored_bits(float& v, int32_t bits) { v = std::bit_cast<float>(bits); }
template <class T>
void put_stored_bits(T& v, int16_t bits) {
  v.bits = static_cast<uint16_t>(bits);
}

}  // namespace

// Integer compares and masks on the stored bits: the compiler vectorizes them for any instruction
// set.
template <class T>
void mask_gradient(const T* grad, const T* x, int64_t n, float clip, T* out) {
  using Bits = std::conditional_t<std::is_same_v<T, float>, int32_t, int16_t>;
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  const Bits threshold = static_cast<Bits>(stored_threshold<T>(clip));
  for (int64_t i = 0; i < n; ++i) {
    const Bits magnitude = stored_bits(x[i]) & kMagnitude;
    const Bits keep = magnitude < threshold ? -1 : 0;
    put_stored_bits(out[i], stored_bits(grad[i]) & keep);
  }
}

template <class T>
void quantize_rows(const Parallel& parallel, const T* x, int64_t rows, int64_t n, int bits,
                   bool bf16_scale, int8_t* codes, float* scale) {
  parallel.rows(rows, n * static_cast<int64_t>(sizeof(T) + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      scale[r] = quantize_row(x + r * n, n, bits, bf16_scale, codes + r * n);
    }
  });
}

#define LLMQAT_INSTANTIATE(T)                                                                     \
  template uint32_t amax_bits_of_row<T>(const T*, int64_t);                                       \
  template void codes_of_row<T>(const T*, int64_t, float, int, int8_t*);                          \
  template float quantize_row<T>(const T*, int64_t, int, bool, int8_t*);                          \
  template void quantize_rows<T>(const Parallel&, const T*, int64_t, int64_t, int, bool, int8_t*, \
                                 float*);                                                         \
  template void dequantize_row<T>(const int8_t*, int64_t, float, T*);                             \
  template void fake_quantize_row<T>(const T*, int64_t, int, bool, T*);                           \
  template void mask_gradient<T>(const T*, const T*, int64_t, float, T*);
LLMQAT_INSTANTIATE(float)
LLMQAT_INSTANTIATE(bf16)
LLMQAT_INSTANTIATE(fp16)
#undef LLMQAT_INSTANTIATE

}  // namespace llmqat::cpu
