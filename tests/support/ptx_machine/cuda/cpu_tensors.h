// Put before the host code of csrc's CUDA operators: they then take CPU tensors, and are registered
// for them in the namespace fastvlp_ptx.
#pragma once

#define USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define is_cuda is_cpu

#undef STABLE_TORCH_LIBRARY
#undef STABLE_TORCH_LIBRARY_IMPL
#define KEY_OF_CUDA CPU
#define KEY_OF_CompositeExplicitAutograd CompositeExplicitAutograd
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns##_ptx, m)
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) \
  _STABLE_TORCH_LIBRARY_IMPL(ns##_ptx, KEY_OF_##key, m, C10_UID)
