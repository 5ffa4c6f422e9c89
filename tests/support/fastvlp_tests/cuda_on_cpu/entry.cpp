// The functions of csrc/cuda/contrastive/contrastive.h with plain C arguments; follows
// contrastive.cu in one translation unit.
#include <vector>

using namespace fastvlp;
using namespace fastvlp::cuda;

namespace {

bool vectors(const void* data, int64_t stride, int64_t bytes) {
  return stride % 4 == 0 && reinterpret_cast<uintptr_t>(data) % (4 * bytes) == 0;
}

Similarities similarities_of(const float* data, int64_t rows, int64_t cols, int64_t stride,
                     int64_t offset) {
  return {data, rows, cols, stride, offset, vectors(data, stride, 4)};
}

Output output_of(void* data, int64_t stride, int element) {
  return {data, stride, static_cast<Element>(element), vectors(data, stride, element ? 2 : 4)};
}

const LsePair kUnwritten = {NAN, NAN};

}  // namespace

extern "C" const char* run_statistics(const float* data, int64_t rows, int64_t cols, int64_t stride,
                                      int64_t offset, const float* scale, double* row_negatives,
                                      float* positive, float* col_pairs) {
  const Similarities p = similarities_of(data, rows, cols, stride, offset);
  std::vector<LsePair> row_scratch(row_pair_count(p), kUnwritten);
  std::vector<LsePair> col_scratch(col_pair_count(p), kUnwritten);
  return statistics({0, nullptr}, p, scale, row_scratch.data(), col_scratch.data(),
                    {row_negatives, positive, col_pairs, col_pairs ? col_pairs + cols : nullptr});
}

extern "C" const char* run_gradient(const float* data, int64_t rows, int64_t cols, int64_t stride,
                                    int64_t offset, const float* scale, const double* row_lse,
                                    const double* col_lse, const float* positive_gradient,
                                    const float* weights, void* out, int64_t out_stride,
                                    int element) {
  return softmax_gradient({0, nullptr}, similarities_of(data, rows, cols, stride, offset), scale,
                          row_lse, col_lse, positive_gradient, weights,
                          output_of(out, out_stride, element));
}

extern "C" const char* run_sigmoid(const float* data, int64_t rows, int64_t cols, int64_t stride,
                                   int64_t offset, const float* scale, const float* bias,
                                   float factor, double* sums, void* out, int64_t out_stride,
                                   int element) {
  const Similarities p = similarities_of(data, rows, cols, stride, offset);
  std::vector<double> partials(sigmoid_partial_count(p), NAN);
  return sigmoid({0, nullptr}, p, scale, bias, factor, partials.data(), sums,
                 output_of(out, out_stride, element));
}
