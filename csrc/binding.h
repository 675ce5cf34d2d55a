#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

#include "ggro/cuda.h"
#include "ggro/ops.h"

// How the functions of the kernels become functions of a Python module.

namespace ggro::binding {

namespace py = pybind11;

// How a field of an argument struct comes from Python: addresses and dtype codes as integers, numbers as they are.
template <typename Field>
struct Wire {
  using Type = Field;
  static Field read(Type value) { return value; }
};

template <typename Pointee>
struct Wire<Pointee*> {
  using Type = uintptr_t;
  static Pointee* read(Type value) { return reinterpret_cast<Pointee*>(value); }
};

template <>
struct Wire<ggro::DType> {
  using Type = int;
  static ggro::DType read(Type value) { return static_cast<ggro::DType>(value); }
};

template <>
struct Wire<ggro::HeadsView> {
  using Type = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
  static ggro::HeadsView read(const Type& value) {
    const auto [address, batch_stride, head_stride, token_stride] = value;
    return {reinterpret_cast<const void*>(address), batch_stride, head_stride, token_stride};
  }
};

// Stands for a field of any type where fields are counted.
struct AnyField {
  template <typename T>
  operator T() const;
};

template <typename>
using ForEach = AnyField;

template <typename Args, typename... Fields>
constexpr auto has_room_for(int) -> decltype(Args{std::declval<Fields>()...}, true) {
  return true;
}
template <typename Args, typename... Fields>
constexpr bool has_room_for(long) {
  return false;
}

// Whether so many fields are all that the struct has.
template <typename Args, typename... Fields>
constexpr bool has_fields() {
  return has_room_for<Args, ForEach<Fields>...>(0) && !has_room_for<Args, ForEach<Fields>..., AnyField>(0);
}

// Defines a function that takes the fields in this order. Tensors, their checks and their allocation belong to Python.
template <typename Args, typename... Fields>
void define(py::module_& m, const char* name, void (*op)(const Args&), Fields Args::*... fields) {
  static_assert(has_fields<Args, Fields...>(), "name every field of the argument struct once");
  m.def(
      name,
      [=](typename Wire<Fields>::Type... values) {
        Args args = {};
        ((args.*fields = Wire<Fields>::read(values)), ...);
        op(args);
      },
      py::call_guard<py::gil_scoped_release>());
}

// The same for kernels on a GPU: the fields but num_threads, then the address of the workspace, the device's number and
// the address of its stream; and `NAME_workspace`, how many bytes the workspace has for these fields.
template <typename Args, typename... Fields>
void define(py::module_& m, const char* name, int64_t (*workspace_bytes)(const Args&),
            void (*op)(const Args&, void*, const cuda::Stream&), Fields Args::*... fields) {
  static_assert(has_fields<Args, Fields..., int>(), "name every field of the argument struct but num_threads once");
  m.def((std::string(name) + "_workspace").c_str(), [=](typename Wire<Fields>::Type... values) {
    Args args = {};
    ((args.*fields = Wire<Fields>::read(values)), ...);
    return workspace_bytes(args);
  });
  m.def(
      name,
      [=](typename Wire<Fields>::Type... values, uintptr_t workspace, int device, uintptr_t stream) {
        Args args = {};
        ((args.*fields = Wire<Fields>::read(values)), ...);
        op(args, reinterpret_cast<void*>(workspace), {device, reinterpret_cast<void*>(stream)});
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace ggro::binding
