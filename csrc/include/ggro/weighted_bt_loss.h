#pragma once

#include <cstdint>

#include "ggro/types.h"

namespace ggro {

// Pairs of rewards at positions of a chosen and a rejected response. A pair of weight zero does not exist: neither its
// positions nor its rewards are looked at. Both ops throw std::out_of_range for a position outside the rewards.
//
// weighted_bt_loss: loss = - sum w * log sigmoid(chosen - rejected), in fp64: the pairs of a row in order, then the
// rows in order.
//
// weighted_bt_loss_backward: d loss / d rewards, times loss_gradient. w * sigmoid(rejected - chosen) is taken from the
// chosen and added to the rejected reward, summed in fp64 and in the order of the pairs where a position repeats, zero
// elsewhere.
struct WeightedBTLossArgs {
  const void* chosen_rewards;  // [rows, chosen_length], unit column stride
  int64_t chosen_length;
  int64_t chosen_stride;         // in elements
  const void* rejected_rewards;  // [rows, rejected_length], unit column stride
  int64_t rejected_length;
  int64_t rejected_stride;            // in elements
  DType dtype;                        // of both rewards
  const int64_t* chosen_positions;    // [rows, pairs], contiguous
  const int64_t* rejected_positions;  // [rows, pairs], contiguous
  const void* weights;                // [rows, pairs], contiguous
  DType weights_dtype;
  int64_t rows;
  int64_t pairs;
  bool mean;                   // divide by the number of pairs, where there is one
  float* loss;                 // written by weighted_bt_loss
  const float* loss_gradient;  // read by weighted_bt_loss_backward
  void* chosen_gradient;       // [rows, chosen_length], contiguous, dtype of the rewards; written by it
  void* rejected_gradient;     // [rows, rejected_length], contiguous, dtype of the rewards; written by it
  int num_threads;
};

}  // namespace ggro
