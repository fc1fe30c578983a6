// Global and Shared of csrc/cuda/memory.cuh, which includes this, with every access checked.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

namespace resnet_fused::cuda {

template <typename T>
class Global {
  using Value = std::remove_const_t<T>;

 public:
  Global() = default;
  Global(T* elements, int64_t count) : elements_(elements), count_(count) {}
  explicit operator bool() const { return elements_ != nullptr; }

  Value load(int64_t i) const { return read<Value>(i, 1, false); }
  Value load_fresh(int64_t i) const { return read<Value>(i, 1, true); }
  void store(int64_t i, Value value) const { write(i, 1, value); }

  template <int n>
  Vector<Value, n> load_vector(int64_t i) const {
    return read<Vector<Value, n>>(i, n, false);
  }
  template <int n>
  void store_vector(int64_t i, const Vector<Value, n>& values) const {
    write(i, n, values);
  }

  unsigned atomic_inc(int64_t i, unsigned last) const {
    static_assert(std::is_same_v<T, unsigned>);
    emulation::check_atomic(access(i, 1));
    const unsigned old = elements_[i];
    elements_[i] = old >= last ? 0 : old + 1;
    return old;
  }

 private:
  emulation::Access access(int64_t i, int n) const { return {elements_, count_, i, n, sizeof(T)}; }
  template <typename V>
  V read(int64_t i, int n, bool fresh) const {
    emulation::check_load(access(i, n), fresh);
    V value;
    std::memcpy(&value, elements_ + i, sizeof(value));
    return value;
  }
  template <typename V>
  void write(int64_t i, int n, const V& value) const {
    static_assert(!std::is_const_v<T>, "a Global of const elements is not written");
    emulation::check_store(access(i, n));
    std::memcpy(elements_ + i, &value, sizeof(value));
  }

  T* elements_ = nullptr;
  int64_t count_ = 0;
};

template <typename T, int n>
class Shared {
 public:
  T load(int i) const {
    emulation::check_shared_load(history_, i, n);
    return elements_[i];
  }
  void store(int i, T value) {
    emulation::check_shared_store(history_, i, n);
    elements_[i] = value;
  }
  template <int m>
  void store_run(int i, const T (&values)[m]) {
    for (int k = 0; k < m; ++k) store(i + k, values[k]);
  }

 private:
  T elements_[n];
  mutable emulation::History history_[n];
};

}  // namespace resnet_fused::cuda
