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

// A byte of each lane.
template <typename I>
ALWAYS_INLINE void store_bytes(uint8_t* bytes, I value, int64_t count) {
  constexpr int kCount = sizeof(I) / sizeof(value[0]);
  using Bytes = typename Words<kCount>::bytes;
#if CPU_VECTOR_BYTES == 64  // GCC 12 takes lanes apart
  Bytes narrow;
  if constexpr (kCount == 16) narrow = (Bytes)_mm512_cvtepi32_epi8((__m512i)value);
  if constexpr (kCount == 8) narrow = (Bytes)_mm_cvtsi128_si64(_mm512_cvtepi64_epi8((__m512i)value));
#else
  const Bytes narrow = __builtin_convertvector(value, Bytes);
#endif
  __builtin_memcpy(bytes, &narrow, count);
}

// Which of so many bytes have that value, a bit each; those beyond are anything.
template <int64_t lanes>
ALWAYS_INLINE unsigned equal_bytes(const uint8_t* bytes, int value) {
#if defined(__SSE2__)
  __m128i vector{};
  __builtin_memcpy(&vector, bytes, lanes);
  return static_cast<unsigned>(_mm_movemask_epi8(_mm_cmpeq_epi8(vector, _mm_set1_epi8(static_cast<char>(value)))));
#else
  unsigned bits = 0;
  for (int64_t i = 0; i < lanes; ++i) bits |= static_cast<unsigned>(bytes[i] == value) << i;
  return bits;
#endif
}

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
    store_bytes(winners + j, winner, extent.count);
  });
}

// The sums of the gradients that were won.
template <typename T>
void add_won(const Tap<T>* taps, int count, int64_t first, int64_t length, T* grad) {
  for_each_vector_of<T>(length, [&](int64_t j, auto extent) INLINED {
    vector_t<T> sum{};
    for (int t = 0; t < count; ++t) {
      const unsigned won = equal_bytes<kLanes<T>>(taps[t].winners + first + j, taps[t].position);
      sum += select(won, load(taps[t].values + first + j, Whole<kLanes<T>>{}));
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

// ---- Rows ----

// A row after the other of several images.
struct ImageRow {
  int64_t n, row;

  ImageRow(int64_t index, int64_t rows) : n(index / rows), row(index % rows) {}
  ALWAYS_INLINE void step(int64_t rows) {
    if (++row == rows) ++n, row = 0;
  }
};

// What a kernel takes of a block: in contiguous tensors a channel after the other, of which a pixel is one value.
struct Units {
  int64_t first, count, values;

  Units(const Plan& plan, const PooledRows& rows, int64_t block) : first(plan.block_begin(block)) {
    const int64_t channels = plan.block_end(block) - first;
    count = rows.channels_last ? 1 : channels, values = channels / count;
  }
  // How many runs of adjacent values a row is, of so many pixels.
  int64_t runs(const PooledRows& rows, int64_t pixels) const { return values == rows.pixel_stride() ? 1 : pixels; }
};

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
  const Units units(plan, rows, block);
  const PhasedRow row = rows.input_row(units.values);
  const int64_t size = row.size(), kept_rows = rows.input_rows(), height = windows.output[0], width = windows.output[1];
  T *const kept = static_cast<T*>(scratch), *const linear = kept + kept_rows * size + kSlack;
  const vector_t<T> nothing = vector_t<T>{} - static_cast<acc_t<T>>(__builtin_inf());
  for (int64_t j = 0; j < kept_rows * size; j += kLanes<T>) store(kept + j, nothing, Whole<kLanes<T>>{}, false);
  int64_t places[kNoWinner];  // of the windows' positions, in a row
  for (int64_t kw = 0; kw < windows.kernel[1]; ++kw) places[kw] = row.at(windows.input(1, 0, kw));
  const int64_t runs = units.runs(rows, width), length = width * units.values / runs;

  Values<T> values;
  if (rows.channels_last) fill(values, plan, block, coefficients);
  for (int64_t channel = units.first; channel < units.first + units.count; ++channel) {
    if (!rows.channels_last) {
      values.mean.at(0) = vector_t<T>{} + static_cast<acc_t<T>>(coefficients.mean[channel]);
      values.scale.at(0) = vector_t<T>{} + static_cast<acc_t<T>>(coefficients.scale[channel]);
      values.shift.at(0) = vector_t<T>{} + static_cast<acc_t<T>>(coefficients.shift[channel]);
    }
    int64_t next = 0;  // row of the image that is to be normalised
    ImageRow window(begin, height);
    for (int64_t index = begin; index < end; ++index, window.step(height)) {
      const int64_t top = rows.larger(windows.input(0, window.row, 0), 0);
      const int64_t bottom = rows.smaller(windows.input(0, window.row, windows.kernel[0] - 1), rows.height - 1);
      next = index == begin || window.row == 0 ? top : rows.larger(next, top);
      for (; next <= bottom; ++next) {
        const T* x = static_cast<const T*>(input) + rows.offset(window.n, channel, next, rows.height, rows.width);
        T* const phases = kept + (next & (kept_rows - 1)) * size;
        if (rows.channels_last) {
          for (int64_t w = 0; w < rows.width; ++w, x += rows.channels) {
            rectify(values, false, x, units.values, phases + row.at(w));
          }
        } else if (row.phases == 1) {
          rectify(values, true, x, rows.width, phases + row.at(0));
        } else {
          rectify(values, true, x, rows.width, linear);
          split(linear, rows.width, row, phases);
        }
      }

      Tap<T> taps[kNoWinner];
      int count = 0, position = 0;
      for (int64_t kh = 0; kh < windows.kernel[0]; ++kh, position += static_cast<int>(windows.kernel[1])) {
        const int64_t h = windows.input(0, window.row, kh);
        if (h < 0 || h >= rows.height) continue;
        const T* const at = kept + (h & (kept_rows - 1)) * size;
        for (int kw = 0; kw < windows.kernel[1]; ++kw) taps[count++] = {at + places[kw], nullptr, position + kw};
      }
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t at = rows.offset(window.n, channel, window.row, height, width) + run * rows.channels;
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
  const Units units(plan, rows, block);
  const PhasedRow row = rows.window_row(units.values);
  const int64_t kept_rows = rows.window_rows(), size = kept_rows * row.size() + kSlack;
  const int64_t height = windows.output[0], width = windows.output[1], stride = windows.stride[1];
  T *const kept = static_cast<T*>(scratch), *const phases = kept + size;
  uint8_t* const kept_winners = reinterpret_cast<uint8_t*>(phases + rows.gradient_row());
  __builtin_memset(kept, 0, size * sizeof(T));
  __builtin_memset(kept_winners, kNoWinner, size);
  const int64_t runs = units.runs(rows, width), length = width * units.values / runs;

  // Pixel j of phase r is in windows j - within, of that phase, at position kw; pixels h likewise.
  struct Position {
    int64_t phase, within;
  };
  const auto position = [&](int axis, int64_t k) {
    const int64_t at = windows.input(axis, 0, k), within = PhasedRow::floor_div(at, windows.stride[axis]);
    return Position{at - within * windows.stride[axis], within};
  };
  Position of_rows[kNoWinner], of_columns[kNoWinner];
  for (int64_t kh = 0; kh < windows.kernel[0]; ++kh) of_rows[kh] = position(0, kh);
  for (int64_t kw = 0; kw < windows.kernel[1]; ++kw) of_columns[kw] = position(1, kw);

  for (int64_t channel = units.first; channel < units.first + units.count; ++channel) {
    int64_t next = 0;  // row of windows that is to be copied
    ImageRow pixel(begin, rows.height);
    ImageRow in_phase(pixel.row, windows.stride[0]);  // n: pixel.row / stride
    for (int64_t index = begin; index < end; ++index, pixel.step(rows.height), in_phase.step(windows.stride[0])) {
      if (pixel.row == 0) in_phase = ImageRow(0, windows.stride[0]);
      const int64_t last = in_phase.n - of_rows[0].within - (in_phase.row < of_rows[0].phase ? 1 : 0);
      const int64_t bottom = rows.smaller(last, height - 1);
      next = index == begin || pixel.row == 0 ? rows.larger(bottom - kept_rows + 1, 0) : next;
      for (; next <= bottom; ++next) {
        for (int64_t run = 0; run < runs; ++run) {
          const int64_t from = rows.offset(pixel.n, channel, next, height, width) + run * rows.channels;
          const int64_t to = (next & (kept_rows - 1)) * row.size() + row.at(0) + run * length;
          __builtin_memcpy(kept + to, static_cast<const T*>(grad_output) + from, length * sizeof(T));
          __builtin_memcpy(kept_winners + to, winners + from, length);
        }
      }

      T* const dx = static_cast<T*>(grad) + rows.offset(pixel.n, channel, pixel.row, rows.height, rows.width);
      for (int64_t r = 0; r < stride && r < rows.width; ++r) {
        Tap<T> taps[kNoWinner];
        int count = 0;
        for (int64_t kh = windows.kernel[0]; kh-- > 0;) {  // the windows in their order
          const int64_t window = in_phase.n - of_rows[kh].within;
          if (of_rows[kh].phase != in_phase.row || window < 0 || window >= height) continue;
          const int64_t at = (window & (kept_rows - 1)) * row.size() + row.at(0);
          for (int64_t kw = windows.kernel[1]; kw-- > 0;) {
            if (of_columns[kw].phase != r) continue;
            const int64_t first = at - of_columns[kw].within * units.values;
            taps[count++] = {kept + first, kept_winners + first, static_cast<int>(kh * windows.kernel[1] + kw)};
          }
        }
        const int64_t pixels = (rows.width - r + stride - 1) / stride;
        if (rows.channels_last) {
          for (int64_t j = 0; j < pixels; ++j) {
            add_won(taps, count, j * units.values, units.values, dx + (r + j * stride) * rows.channels);
          }
        } else {
          const int64_t whole = (pixels + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
          add_won(taps, count, 0, whole, phases + r * rows.gradient_phase());
        }
      }
      if (!rows.channels_last) join(phases, rows.gradient_phase(), stride, rows.width, dx);
    }
  }
}
