#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "slab_product.h"
#include "threads.h"
#include "top_k.h"

// In an unnamed namespace for the reason given in simd.h.
namespace ggro::cpu {
namespace {

// The k best scores of every row of `a`, at most kMaxRows, among its products with the rows of `table`. Scores live in
// the second-level cache, one slab of the table at a time, and are compared there with each row's k-th best.
// finish_slab(row, first, columns, scores): makes the scores of table rows first .. first + columns - 1 of the products
// [kSlab]. Slabs begin at multiples of kSlab. finish_row(row, top): takes the result, sorted.
// Either is called on several threads, for one row or slab of a row each.
template <typename A, typename B, typename FinishSlab, typename FinishRow>
void product_top_k(const Rows<A>& a, const Rows<B>& table, int64_t width, int64_t k, int num_threads,
                   const FinishSlab& finish_slab, const FinishRow& finish_row) {
  // Multiply-adds.
  constexpr int64_t kMinWorkPerThread = 1 << 18;
  const int64_t slabs = slab_count(table.count);
  const int64_t work = a.count * table.count * std::max<int64_t>(width, 1);
  const int64_t threads = thread_count(num_threads, slabs, work, kMinWorkPerThread);
  std::vector<SlabProduct<A, B>> products;
  products.reserve(static_cast<size_t>(threads));
  for (int64_t thread = 0; thread < threads; ++thread) products.emplace_back(a, table, width);
  RowTopKs top(threads, a.count, k);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
  for (int64_t thread = 0; thread < threads; ++thread) {
    for (int64_t slab = slabs * thread / threads; slab < slabs * (thread + 1) / threads; ++slab) {
      const int64_t first = slab * kSlab;
      const int64_t columns = std::min(kSlab, table.count - first);
      float* scores = products[static_cast<size_t>(thread)].multiply(first, columns);
      for (int64_t row = 0; row < a.count; ++row, scores += kSlab) {
        finish_slab(row, first, columns, scores);
        top.part(thread, row).offer(scores, columns, first);
      }
    }
  }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1)
#endif
  for (int64_t row = 0; row < a.count; ++row) finish_row(row, top.merge(row));
}

}  // namespace
}  // namespace ggro::cpu
