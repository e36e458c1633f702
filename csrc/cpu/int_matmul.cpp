// Scalar integer tiles and the choice of the table. Contract, layout and reasons: int_matmul.h.
#include "int_matmul.h"

namespace llmqat::cpu {
namespace {

// Sums are unsigned: the contract is arithmetic modulo 2^32 and signed overflow is undefined.
template <bool kInt4>
void tile_row(const int8_t* a, const uint8_t* panel, int64_t quads,
              uint32_t (&acc)[kPanelChannels]) {
  constexpr int kHalf = kPanelChannels / 2;
  for (int64_t q = 0; q < quads; ++q, a += kQuad) {
    for (int i = 0; i < (kInt4 ? kHalf : kPanelChannels); ++i) {
      for (int j = 0; j < kQuad; ++j) {
        const int u = *panel++;
        if constexpr (kInt4) {
          acc[i] += static_cast<uint32_t>((u & 15) * a[j]);
          acc[kHalf + i] += static_cast<uint32_t>((u >> 4) * a[j]);
        } else {
          acc[i] += static_cast<uint32_t>(u * a[j]);
        }
      }
    }
  }
}

template <bool kInt4>
void tile(int rows, int panels, const TileArgs& t) {
  for (int r = 0; r < rows; ++r) {
    for (int p = 0; p < panels; ++p) {
      uint32_t acc[kPanelChannels] = {};
      tile_row<kInt4>(t.a + r * t.lda, t.panel + p * t.panel_stride, t.quads, acc);
      int32_t* out = t.out + r * t.ldo + p * kPanelChannels;
      for (int i = 0; i < kPanelChannels; ++i) {
        const uint32_t before = t.accumulate ? static_cast<uint32_t>(out[i]) : 0;
        out[i] = static_cast<int32_t>(before + static_cast<uint32_t>(t.init[r]) + acc[i]);
      }
    }
  }
}

int tile_panels(int) { return 1; }

int32_t sum(const int8_t* a, int64_t n) {
  int32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += a[i];
  return total;
}

}  // namespace

const IntKernels kIntKernelsScalar = {4,       tile_panels, tile<true>, tile<false>,
                                      nullptr, nullptr,     sum};

const IntKernels& int_kernels(Isa isa) {
  switch (isa) {
    case Isa::avx512vnni: return kIntKernelsAvx512;
    case Isa::avx2: return kIntKernelsAvx2;
    default: return kIntKernelsScalar;
  }
}

}  // namespace llmqat::cpu
