// The kernels around max pooling, as kernels_impl.h includes them, for every instruction set.

// ---- Windows ----

// What the windows of a row have at one of their positions.
template <typename T>
struct Tap {
  const T* values;
  const uint8_t* winners;
  int position;
};

template <typename T>
using lanes_t = decltype(vector_t<T>{} < vector_t<T>{});  // integers

// Calls f(j, Whole or Part) for the vectors of so many values.
template <typename T, typename F>
ALWAYS_INLINE void for_each_vector_of(int64_t count, F f) {
  int64_t j = 0;
  for (; j + kLanes<T> <= count; j += kLanes<T>) f(j, Whole<kLanes<T>>{});
  if (j < count) f(j, Part{count - j});
}

// As max_pool2d: of equal values the first, of NaNs the last. What it takes is rectified: 0 or less wins no gradient.
template <typename T>
void take_maxima(const Tap<T>* taps, int count, int64_t first, int64_t length, T* output, uint8_t* winners) {
  for_each_vector_of<T>(length, [&](int64_t j, auto extent) INLINED {
    vector_t<T> best = vector_t<T>{} - static_cast<acc_t<T>>(__builtin_inf());
    lanes_t<T> winner{};
    for (int t = 0; t < count; ++t) {
      const vector_t<T> value = load(taps[t].values + first + j, Whole<kLanes<T>>{});
      const lanes_t<T> wins = (value > best) | (value != value);
      best = wins ? value : best;
      winner = wins ? lanes_t<T>{} + taps[t].position : winner;
    }
    store(output + j, best, extent, false);
    if (winners == nullptr) return;
    winner = best <= 0 ? lanes_t<T>{} + kNoWinner : winner;
    const auto bytes = __builtin_convertvector(winner, typename Words<kLanes<T>>::bytes);
    __builtin_memcpy(winners + j, &bytes, extent.count);
  });
}

// The sums of the gradients that were won.
template <typename T>
void add_won(const Tap<T>* taps, int count, int64_t first, int64_t length, T* grad) {
  for_each_vector_of<T>(length, [&](int64_t j, auto extent) INLINED {
    vector_t<T> sum{};
    for (int t = 0; t < count; ++t) {
      typename Words<kLanes<T>>::bytes bytes;
      __builtin_memcpy(&bytes, taps[t].winners + first + j, sizeof(bytes));
      const auto won = __builtin_convertvector(bytes, lanes_t<T>) == taps[t].position;
      sum += won ? load(taps[t].values + first + j, Whole<kLanes<T>>{}) : vector_t<T>{};
    }
    store(grad + j, sum, extent, false);
  });
}

// ---- Phases, in contiguous tensors ----

struct Stride {
  int64_t value;
};

// f(Number<2>), for which the compiler has vectors, or f(Stride).
template <typename F>
ALWAYS_INLINE void with_stride(int64_t stride, F f) {
  if (stride == 2) return f(Number<2>{});
  f(Stride{stride});
}

template <typename T>
void split(const T* __restrict row, int64_t width, const PhasedRow& to, T* __restrict phases) {
  with_stride(to.phases, [=](auto stride) INLINED {
    for (int64_t r = 0; r < stride.value && r < width; ++r) {
      T* const phase = phases + to.at(r);
      const int64_t count = (width - r + stride.value - 1) / stride.value;
      for (int64_t j = 0; j < count; ++j) phase[j] = row[j * stride.value + r];
    }
  });
}

template <typename T>
void join(const T* __restrict phases, int64_t phase, int64_t stride_, int64_t width, T* __restrict row) {
  with_stride(stride_, [=](auto stride) INLINED {
    const int64_t whole = width / stride.value;
    for (int64_t j = 0; j < whole; ++j) {
      for (int64_t r = 0; r < stride.value; ++r) row[j * stride.value + r] = phases[r * phase + j];
    }
    for (int64_t w = whole * stride.value; w < width; ++w) row[w] = phases[w % stride.value * phase + whole];
  });
}

// ---- Forward ----

template <typename T>
ALWAYS_INLINE void rectify(const Values<T>& values, bool of_one_channel, const T* x, int64_t count, T* y) {
  for_each_vector_of<T>(count, [&](int64_t j, auto extent) INLINED {
    const vector_t<T> value = normalized(load(x + j, extent), values, of_one_channel ? 0 : j);
    store(y + j, vector_t<T>{} > value ? vector_t<T>{} : value, extent, false);
  });
}

template <typename T>
void normalize_max_pool(const Plan& plan, const PooledRows& rows, int64_t block, int64_t begin, int64_t end,
                        const Coefficients& coefficients, const void* input, void* output, uint8_t* winners,
                        void* scratch) {
  const MaxPool& windows = rows.windows;
  const int64_t first_channel = plan.block_begin(block), channels = plan.block_end(block) - first_channel;
  const int64_t units = rows.channels_last ? 1 : channels, group = channels / units, held = rows.input_rows();
  const PhasedRow row = rows.input_row(group);
  T *const kept = static_cast<T*>(scratch), *const linear = kept + held * row.size() + kSlack;
  const vector_t<T> nothing = vector_t<T>{} - static_cast<acc_t<T>>(__builtin_inf());
  for (int64_t j = 0; j < held * row.size(); j += kLanes<T>) store(kept + j, nothing, Whole<kLanes<T>>{}, false);

  Values<T> values;
  if (rows.channels_last) fill(values, plan, block, coefficients);
  for (int64_t channel = first_channel; channel < first_channel + units; ++channel) {
    if (!rows.channels_last) {
      values.mean.at(0) = vector_t<T>{} + static_cast<acc_t<T>>(coefficients.mean[channel]);
      values.scale.at(0) = vector_t<T>{} + static_cast<acc_t<T>>(coefficients.scale[channel]);
      values.shift.at(0) = vector_t<T>{} + static_cast<acc_t<T>>(coefficients.shift[channel]);
    }
    int64_t next = 0;  // row of the image that is to be normalised
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / windows.output[0], window = index % windows.output[0];
      const int64_t top = rows.larger(windows.input(0, window, 0), 0);
      const int64_t bottom = rows.smaller(windows.input(0, window, windows.kernel[0] - 1), rows.height - 1);
      next = index == begin || window == 0 ? top : rows.larger(next, top);
      for (; next <= bottom; ++next) {
        const T* x = static_cast<const T*>(input) + rows.offset(n, channel, next, rows.height, rows.width);
        T* const phases = kept + next % held * row.size();
        if (rows.channels_last) {
          for (int64_t w = 0; w < rows.width; ++w, x += rows.channels)
            rectify(values, false, x, group, phases + row.at(w));
        } else if (row.phases == 1) {
          rectify(values, true, x, rows.width, phases + row.at(0));
        } else {
          rectify(values, true, x, rows.width, linear);
          split(linear, rows.width, row, phases);
        }
      }

      Tap<T> taps[kNoWinner];
      int count = 0;
      for (int64_t kh = 0; kh < windows.kernel[0]; ++kh) {
        const int64_t h = windows.input(0, window, kh);
        if (h < 0 || h >= rows.height) continue;
        for (int64_t kw = 0; kw < windows.kernel[1]; ++kw) {
          const int64_t at = h % held * row.size() + row.at(windows.input(1, 0, kw));
          taps[count++] = {kept + at, nullptr, static_cast<int>(kh * windows.kernel[1] + kw)};
        }
      }
      // All the row at once, where it is adjacent.
      const int64_t runs = group == rows.pixel_stride() ? 1 : windows.output[1],
                    length = windows.output[1] * group / runs;
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t at = rows.offset(n, channel, window, windows.output[0], windows.output[1]) + run * rows.channels;
        take_maxima(taps, count, run * length, length, static_cast<T*>(output) + at,
                    winners == nullptr ? nullptr : winners + at);
      }
    }
  }
}

// ---- Backward ----

template <typename T>
void max_unpool(const Plan& plan, const PooledRows& rows, int64_t block, int64_t begin, int64_t end,
                const void* grad_output, const uint8_t* winners, void* grad, void* scratch) {
  const MaxPool& windows = rows.windows;
  const int64_t first_channel = plan.block_begin(block), channels = plan.block_end(block) - first_channel;
  const int64_t units = rows.channels_last ? 1 : channels, group = channels / units, held = rows.window_rows();
  const PhasedRow row = rows.window_row(group);
  const int64_t size = held * row.size() + kSlack, stride = windows.stride[1];
  T *const kept = static_cast<T*>(scratch), *const phases = kept + size;
  uint8_t* const kept_winners = reinterpret_cast<uint8_t*>(phases + rows.gradient_row());
  __builtin_memset(kept, 0, size * sizeof(T));
  __builtin_memset(kept_winners, kNoWinner, size);

  for (int64_t channel = first_channel; channel < first_channel + units; ++channel) {
    int64_t next = 0;  // row of windows that is to be copied
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / rows.height, h = index % rows.height, below = h + windows.padding[0];
      const int64_t top = rows.larger(-PhasedRow::floor_div(rows.reach(0) - below, windows.stride[0]), 0);
      const int64_t bottom = rows.smaller(below / windows.stride[0], windows.output[0] - 1);
      next = index == begin || h == 0 ? top : rows.larger(next, top);
      for (; next <= bottom; ++next) {
        const int64_t runs = group == rows.pixel_stride() ? 1 : windows.output[1],
                      length = windows.output[1] * group / runs;
        for (int64_t run = 0; run < runs; ++run) {
          const int64_t from =
              rows.offset(n, channel, next, windows.output[0], windows.output[1]) + run * rows.channels;
          const int64_t to = next % held * row.size() + row.at(0) + run * length;
          __builtin_memcpy(kept + to, static_cast<const T*>(grad_output) + from, length * sizeof(T));
          __builtin_memcpy(kept_winners + to, winners + from, length);
        }
      }

      T* const dx = static_cast<T*>(grad) + rows.offset(n, channel, h, rows.height, rows.width);
      for (int64_t r = 0; r < stride && r < rows.width; ++r) {
        Tap<T> taps[kNoWinner];
        int count = 0;
        for (int64_t kh = windows.kernel[0]; kh-- > 0;) {  // the windows in their order
          const int64_t above = below - kh * windows.dilation[0], window = above / windows.stride[0];
          if (above < 0 || above % windows.stride[0] != 0 || window >= windows.output[0]) continue;
          for (int64_t kw = windows.kernel[1]; kw-- > 0;) {
            const int64_t w = windows.input(1, 0, kw), within = PhasedRow::floor_div(w, stride);
            if (w - within * stride != r) continue;
            const int64_t at = window % held * row.size() + row.at(-within);
            taps[count++] = {kept + at, kept_winners + at, static_cast<int>(kh * windows.kernel[1] + kw)};
          }
        }
        const int64_t pixels = (rows.width - r + stride - 1) / stride;
        if (rows.channels_last) {
          for (int64_t j = 0; j < pixels; ++j)
            add_won(taps, count, j * group, group, dx + (r + j * stride) * rows.channels);
        } else {
          add_won(taps, count, 0, pixels, phases + r * rows.gradient_phase());
        }
      }
      if (!rows.channels_last) join(phases, rows.gradient_phase(), stride, rows.width, dx);
    }
  }
}
