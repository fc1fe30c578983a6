#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <exception>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || defined(EMULATE_WITH_UCONTEXT)
#define EMULATION_UCONTEXT
#include <ucontext.h>
#endif

namespace emulation {
namespace {

// ---- Fibers ----

constexpr size_t kPageBytes = 4096;
constexpr size_t kStackBytes = 64 * kPageBytes;

#ifdef EMULATION_UCONTEXT

using Context = ucontext_t;

void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

#else  // swapcontext is a system call, which takes ten times as long

using Context = void**;  // the stack pointer, at the registers that a function preserves and a return address

extern "C" void emulation_switch_context(Context* from, Context to);
asm(R"(
  .text
  .hidden emulation_switch_context
  .globl emulation_switch_context
  .type emulation_switch_context, @function
emulation_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulation_switch_context, .-emulation_switch_context
)");

void make_context(Context& context, char* stack, void (*entry)()) {
  context = reinterpret_cast<void**>(stack + kStackBytes) - 8;
  std::fill_n(context, 8, nullptr);  // the entry's own return address is the last: it never returns
  context[6] = reinterpret_cast<void*>(entry);
}
void switch_context(Context& from, Context& to) { emulation_switch_context(&from, to); }

#endif

struct Fiber {
  Context context;
  char* stack = nullptr;  // the lowest address; null where it has not begun, or has ended
};

std::vector<char*> free_stacks;

char* take_stack() {
  if (free_stacks.empty()) {
    constexpr size_t kBytes = kPageBytes + kStackBytes;  // the first page faults: a stack does not overflow unnoticed
    void* pages = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, kPageBytes, PROT_NONE) != 0) throw std::bad_alloc();
    return static_cast<char*>(pages) + kPageBytes;
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

void give_back_stack(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // frames that were abandoned
#endif
  free_stacks.push_back(std::exchange(fiber.stack, nullptr));
}

Fiber launcher;
const void* launcher_stack;  // known, and needed, with AddressSanitizer only
size_t launcher_stack_bytes;

// Goes on with `to`, whose stack is given, until something goes on with `from`.
void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, stack, bytes);
#endif
  switch_context(from.context, to.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}
void enter(Fiber& fiber) { switch_fiber(launcher, fiber, fiber.stack, kStackBytes); }
void leave(Fiber& fiber) { switch_fiber(fiber, launcher, launcher_stack, launcher_stack_bytes); }

// ---- State: of the one launch under way ----

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;

// Ticks at every synchronisation, and never starts anew: what is left of blocks before is simply old.
using Time = uint64_t;
Time now = 0;

// What a thread knows of others: see "Order".
struct Order {
  std::array<Time, kWarp> known{};
  Time atomic = 0, acquired = 0;
};

struct Thread : Fiber {
  unsigned number;
  uint3 index;
  Operation at;  // where it waits
  unsigned mask;
  int size;         // of what a shuffle moves
  uint64_t value;   // given to a warp operation, and got from it
  unsigned source;  // lane
  Order order;

  unsigned lane() const { return number % kWarp; }
  unsigned warp() const { return number / kWarp; }
};

struct Block {
  unsigned index;
  Time begin;
  std::vector<Time> fenced, handed_over;  // by thread: up to when its writes are
};

std::mt19937 random_order;
bool shuffled = false;

const std::function<void()>* kernel;
Lane lane;
std::vector<Thread> threads;
std::vector<Block> blocks;    // that ran, the last still does
std::vector<unsigned> ready;  // threads
std::exception_ptr failure;
Thread* self;  // the running thread

unsigned arrived;                                   // at __syncthreads
std::array<unsigned, kMaxThreads / kWarp> waiting;  // lanes at warp operations, by warp
Time last_barrier;

Block& block() { return blocks.back(); }

// The highest first: what is made ready last runs first.
template <typename Function>
void for_each_lane(unsigned mask, Function function) {
  for (unsigned lane = kWarp; lane-- > 0;) {
    if (mask >> lane & 1) function(lane);
  }
}

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// Caught at the foot of the fiber's stack, in run_kernel().
template <typename... Parts>
[[noreturn]] void fault(const Parts&... parts) {
  throw std::runtime_error(text("block ", block().index, ", thread ", self->number, ": ", parts...));
}

// ---- Order: which access comes before which ----
//
// What a thread did up to a time is known to another
//   - after a __syncthreads: of every thread, up to last_barrier;
//   - after a __syncwarp that both took: of lane i up to known[i], and so on to whom those lanes meet later.
// What is known is ordered. So is, in another block or in the same, what is handed over:
//   - a write, then a __threadfence by a thread to which it is known (it is `fenced`), then an atomic in that block;
//   - on the other side an `atomic`, then a __threadfence (it is `acquired`), then a load_fresh by a thread that took
//     these steps or met, later, one that did.
// Left out: which word the atomics are of, and whether the thread of the first atomic knew of the fence.

using Event = uint64_t;  // a time, and a thread of the block that was running then; 0: none
Event event() { return now * kMaxThreads + self->number; }
Time time_of(Event event) { return event / kMaxThreads; }
unsigned thread_of(Event event) { return event % kMaxThreads; }

Time known_of(const Thread& other) {
  if (&other == self) return now;
  return other.warp() == self->warp() ? std::max(last_barrier, self->order.known[other.lane()]) : last_barrier;
}

// The event is of the running block.
bool ordered(Event event) {
  return thread_of(event) == self->number || time_of(event) < known_of(threads[thread_of(event)]);
}

void meet_at_barrier() {
  last_barrier = ++now;
  Order all;
  for (const Thread& thread : threads) {
    all.atomic = std::max(all.atomic, thread.order.atomic);
    all.acquired = std::max(all.acquired, thread.order.acquired);
  }
  for (Thread& thread : threads) {
    thread.order.atomic = all.atomic;
    thread.order.acquired = all.acquired;
  }
}

void meet_in_warp(Thread* warp, unsigned mask) {
  ++now;
  Order all;
  for_each_lane(mask, [&](unsigned lane) {
    const Order& order = warp[lane].order;
    for (unsigned i = 0; i < kWarp; ++i) all.known[i] = std::max(all.known[i], order.known[i]);
    all.atomic = std::max(all.atomic, order.atomic);
    all.acquired = std::max(all.acquired, order.acquired);
  });
  for_each_lane(mask, [&](unsigned lane) { all.known[lane] = now; });
  for_each_lane(mask, [&](unsigned lane) { warp[lane].order = all; });
}

// Of global memory, in this launch. `fresh`: a load_fresh, or a store.
void check_order(Event write, bool fresh, const char* what) {
  const Time time = time_of(write), acquired = self->order.acquired;
  const unsigned thread = thread_of(write);
  const bool in_this_block = time >= block().begin;
  if (write == 0 || (in_this_block && ordered(write))) return;
  const auto began_later = [](Time time, const Block& block) { return time < block.begin; };
  const Block& writer = *--std::upper_bound(blocks.begin(), blocks.end(), time, began_later);
  const bool handed_over = !writer.handed_over.empty() && time < writer.handed_over[thread];
  const bool taken_over = acquired >= block().begin && acquired > time;
  if (handed_over && taken_over && fresh) return;
  fault(what, " of what block ", writer.index, ", thread ", thread, " wrote: ",
        handed_over && taken_over ? "other blocks' writes are read with load_fresh"
        : handed_over             ? "it was not taken over, by an atomic and then a __threadfence"
        : in_this_block           ? "a race, with no __syncthreads or __syncwarp between"
                                  : "it was not handed over, by a __threadfence and then an atomic");
}

// ---- Meeting points: barriers and warp operations ----
//
// A thread waits there until all those that it names wait at the same. Where no thread can go on, one of them returned
// or waits elsewhere.

const char* name(Operation operation) {
  constexpr const char* kNames[] = {
      "", "", "__syncthreads", "__syncwarp", "__ballot_sync", "__shfl_sync", "__shfl_down_sync", "__shfl_xor_sync",
  };
  return kNames[static_cast<int>(operation)];
}

std::string place(const Thread& thread) {
  if (thread.at == Operation::syncthreads) return name(thread.at);
  return text(name(thread.at), " with mask 0x", std::hex, thread.mask);
}

bool same_place(const Thread& a, const Thread& b) {
  return a.at == b.at && (a.at == Operation::syncthreads || (a.mask == b.mask && a.size == b.size));
}

bool names(const Thread& a, const Thread& b) {
  return a.at == Operation::syncthreads || (a.warp() == b.warp() && (a.mask >> b.lane() & 1));
}

std::string why_stuck() {
  for (const bool in_warp : {true, false}) {  // a barrier waits for warps, seldom a warp for a barrier
    for (const Thread& a : threads) {
      if (a.at == Operation::returned || (a.at != Operation::syncthreads) != in_warp) continue;
      for (const Thread& b : threads) {
        if (!names(a, b) || same_place(a, b)) continue;
        return text("block ", block().index, ", thread ", a.number, ": waits at ", place(a), " for thread ", b.number,
                    ", which ", b.at == Operation::returned ? "returned" : "waits at " + place(b));
      }
    }
  }
  return text("block ", block().index, ": deadlock");
}

// What is ready last runs first: a warp goes on while it is in the cache.
void make_ready(const Thread& thread) {
  ready.push_back(thread.number);
  if (shuffled) std::swap(ready.back(), ready[random_order() % ready.size()]);
}

void release(Thread& thread) {
  thread.at = Operation::none;
  if (&thread != self) make_ready(thread);
}

// All lanes of the mask are here: hands out the results.
void complete(Thread* warp, unsigned mask) {
  const Operation operation = self->at;
  if (operation == Operation::syncwarp) meet_in_warp(warp, mask);
  uint64_t values[kWarp], votes = 0;
  for_each_lane(mask, [&](unsigned lane) {
    values[lane] = warp[lane].value;
    votes |= (values[lane] & 1) << lane;
  });
  for_each_lane(mask, [&](unsigned lane) {
    warp[lane].value = operation == Operation::ballot ? votes : values[warp[lane].source];
    release(warp[lane]);
  });
}

uint64_t meet(Operation operation, unsigned mask, uint64_t value, int size, unsigned source) {
  Thread* warp = &threads[self->number - self->lane()];
  const size_t lanes = std::min<size_t>(kWarp, threads.size() - warp->number);
  if (!(mask >> self->lane() & 1)) fault(name(operation), ": the calling lane is not in its mask 0x", std::hex, mask);
  if (uint64_t{mask} >> lanes) {
    fault(name(operation), ": mask 0x", std::hex, mask, std::dec, " names lanes that do not exist: there are ", lanes);
  }
  if (!(mask >> source & 1)) {
    fault(name(operation), ": reads from lane ", source, ", which is not in its mask 0x", std::hex, mask);
  }
  self->at = operation;
  self->mask = mask;
  self->size = size;
  self->value = value;
  self->source = source;
  unsigned& here = waiting[self->warp()];
  here |= 1u << self->lane();
  const auto missing = [&](const Thread& lane) { return names(*self, lane) && !same_place(*self, lane); };
  if ((here & mask) == mask && std::none_of(warp, warp + lanes, missing)) {
    here &= ~mask;
    complete(warp, mask);
  } else {
    leave(*self);
  }
  return self->value;
}

// ---- Scheduler ----

void run_kernel() {
  try {
    (*kernel)();
  } catch (...) {
    failure = std::current_exception();
  }
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &launcher_stack, &launcher_stack_bytes);
#endif
  run_kernel();
  self->at = Operation::returned;
  leave(*self);
}

void run(Thread& thread) {
  self = &thread;
  threadIdx = thread.index;
  if (thread.stack == nullptr) {
    thread.stack = take_stack();
    make_context(thread.context, thread.stack, fiber_main);
  }
  enter(thread);
  if (thread.at == Operation::returned) give_back_stack(thread);
}

void run_block(unsigned index) {
  blockIdx = {index, 0, 0};
  blocks.push_back({index, ++now, {}, {}});
  last_barrier = now;
  arrived = 0;
  waiting.fill(0);
  ready.clear();
  for (size_t i = threads.size(); i-- > 0;) {
    threads[i].at = Operation::none;
    make_ready(threads[i]);
  }
  while (!ready.empty()) {
    Thread& next = threads[ready.back()];
    ready.pop_back();
    run(next);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
  }
  const auto returned = [](const Thread& thread) { return thread.at == Operation::returned; };
  if (!std::all_of(threads.begin(), threads.end(), returned)) throw std::runtime_error(why_stuck());
}

// ---- Memory ----

// Of every byte of the pages written in this launch, the last store.
std::unordered_map<uintptr_t, std::vector<Event>> pages;

// Of every page, the sectors that were read in this launch.
constexpr size_t kSectorBytes = 32;
std::unordered_map<uintptr_t, std::bitset<kPageBytes / kSectorBytes>> sectors;

// By the address in a Global, which is looked up once a launch, in one of these places.
std::array<std::pair<const void*, Allocation*>, 64> looked_up;
std::vector<Counters> counted;

struct Place {
  uintptr_t address;
  char* written;  // of what was allocated and is to be written
};

Place check_place(const Access& access, const char* what) {
  const int bytes = access.n * access.size;
  if (access.elements == nullptr) fault(what, " of ", bytes, " bytes through a null Global");
  if (access.i < 0 || access.i > access.count - access.n) {
    fault(what, " of ", bytes, " bytes out of bounds: element ", access.i, " to ", access.i + access.n - 1, " of ",
          access.count);
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(access.elements) + access.i * access.size;
  if (address % bytes != 0) fault(what, " of ", bytes, " bytes misaligned: element ", access.i, " is at ", address);
  auto& [elements, allocation] = looked_up[reinterpret_cast<uintptr_t>(access.elements) / 16 % looked_up.size()];
  if (elements != access.elements) elements = access.elements, allocation = find(elements);
  if (allocation == nullptr) return {address, nullptr};
  const Lane& owner = allocation->lane;
  if (allocation->is_freed && (lane.graph == 0 || owner.graph != lane.graph)) fault(what, " of memory that was freed");
  if (owner.device != lane.device) {
    fault(what, " of memory of device ", owner.device, " in a launch on device ", lane.device);
  }
  if (allocation->call != 0 && allocation->call == current_call() && owner.stream != lane.stream) {
    fault(what, " of memory that was allocated for another stream");
  }
  const size_t offset = address - reinterpret_cast<uintptr_t>(allocation->data);
  return {address, allocation->written.empty() ? nullptr : &allocation->written[offset]};
}

void check_was_written(const Place& place, int bytes, const char* what) {
  if (place.written == nullptr || std::memchr(place.written, 0, bytes) == nullptr) return;
  fault(what, " of ", bytes, " bytes that were not written");
}

History& element_of(History* history, int i, int n, const char* what) {
  if (i < 0 || i >= n) fault(what, " of Shared out of bounds: element ", i, " of ", n);
  return history[i];
}

void check_shared_order(Event last, int i, const char* what) {
  if (time_of(last) < block().begin || ordered(last)) return;
  fault(what, " of Shared element ", i, ": a race with thread ", thread_of(last));
}

void run_blocks(unsigned grid, dim3 block, const Lane& of_launch, const std::function<void()>& body) {
  const size_t size = size_t{1} * block.x * block.y * block.z;
  if (size == 0 || size > kMaxThreads) throw std::runtime_error(text("a block of ", size, " threads"));
  for (Thread& thread : threads) {
    if (thread.stack != nullptr) give_back_stack(thread);  // of a launch that was abandoned
  }
  pages.clear();
  sectors.clear();
  blocks.clear();
  looked_up = {};
  lane = of_launch;
  kernel = &body;
  gridDim = grid;
  blockDim = block;
  threads.resize(size);
  for (unsigned i = 0; i < size; ++i) {
    threads[i].number = i;
    threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  counted.push_back({1, static_cast<int64_t>(grid * size), 0, 0, 0, 0});
  std::vector<unsigned> order(grid);
  std::iota(order.begin(), order.end(), 0);
  if (shuffled) std::shuffle(order.begin(), order.end(), random_order);
  for (const unsigned index : order) run_block(index);
}

}  // namespace

// ---- Interface ----

void check_load(const Access& access, bool fresh) {
  const Place place = check_place(access, "load");
  const int bytes = access.n * access.size;
  check_was_written(place, bytes, "load");
  counted.back().bytes_read += bytes;
  auto sector = sectors[place.address / kPageBytes][place.address % kPageBytes / kSectorBytes];
  if (!sector) sector = true, counted.back().bytes_loaded += kSectorBytes;
  const auto page = pages.find(place.address / kPageBytes);
  if (page == pages.end()) return;
  const Event* writes = &page->second[place.address % kPageBytes];
  for (int i = 0; i < bytes; ++i) check_order(writes[i], fresh, "load");
}

void check_store(const Access& access) {
  const Place place = check_place(access, "store");
  const int bytes = access.n * access.size;
  counted.back().bytes_written += bytes;
  std::vector<Event>& page = pages[place.address / kPageBytes];
  page.resize(kPageBytes);
  Event* writes = &page[place.address % kPageBytes];
  for (int i = 0; i < bytes; ++i) {
    check_order(writes[i], true, "store");
    writes[i] = event();
  }
  if (place.written != nullptr) std::memset(place.written, true, bytes);
}

void check_atomic(const Access& access) {
  const Place place = check_place(access, "atomic");
  check_was_written(place, access.size, "atomic");
  if (Allocation* const allocation = find(access.elements)) {
    const Lane& user = allocation->users.try_emplace(place.address, lane).first->second;
    if (!(user == lane)) fault("atomic of a word that another stream, or graph, uses: they may run at the same time");
  }
  ++counted.back().atomics;
  self->order.atomic = ++now;
  block().handed_over = block().fenced;
}

void check_shared_load(History* history, int i, int n) {
  History& element = element_of(history, i, n, "load");
  if (time_of(element.written) < block().begin) {
    fault("load of Shared element ", i, ", which no thread of this block wrote");
  }
  check_shared_order(element.written, i, "load");
  if (thread_of(element.read) != self->number) element.read_by_another = element.read;
  element.read = event();
}

void check_shared_store(History* history, int i, int n) {
  History& element = element_of(history, i, n, "store");
  for (const Event last : {element.written, element.read, element.read_by_another}) {
    check_shared_order(last, i, "store");
  }
  element.written = event();
}

void syncthreads() {
  self->at = Operation::syncthreads;
  if (++arrived < threads.size()) return leave(*self);
  arrived = 0;
  meet_at_barrier();
  for (size_t i = threads.size(); i-- > 0;) release(threads[i]);
}

void threadfence() {
  ++now;
  self->order.acquired = self->order.atomic;
  std::vector<Time>& fenced = block().fenced;
  fenced.resize(threads.size());
  for (const Thread& thread : threads) fenced[thread.number] = std::max(fenced[thread.number], known_of(thread));
}

void syncwarp(unsigned mask) { meet(Operation::syncwarp, mask, 0, 0, self->lane()); }

unsigned ballot(unsigned mask, bool predicate) {
  return static_cast<unsigned>(meet(Operation::ballot, mask, predicate, 0, self->lane()));
}

uint64_t shuffle(Operation operation, unsigned mask, uint64_t value, int size, int operand, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fault(name(operation), ": width ", width);
  const unsigned lane = self->lane(), in_group = width - 1, end = (lane | in_group) + 1;
  unsigned source;
  if (operation == Operation::shuffle) {
    source = (lane & ~in_group) | (operand & in_group);
  } else {
    source = operation == Operation::shuffle_xor ? lane ^ operand : lane + operand;
    if (source >= end) source = lane;  // past the group: one's own value
  }
  return meet(operation, mask, value, size, source);
}

void launch(unsigned grid, dim3 block, cudaStream_t stream, std::function<void()> body) {
  enqueue(stream, [=, body = std::move(body)](const Lane& lane) { run_blocks(grid, block, lane, body); });
}

void memset(void* data, int value, size_t bytes, cudaStream_t stream) {
  enqueue(stream, [=](const Lane&) {
    counted.push_back({1, 0, 0, static_cast<int64_t>(bytes), 0, 0});
    std::memset(data, value, bytes);
    Allocation* const allocation = find(data);
    if (allocation == nullptr || allocation->written.empty()) return;
    std::fill_n(allocation->written.begin() + (static_cast<char*>(data) - allocation->data), bytes, true);
  });
}

void set_seed(unsigned seed) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  shuffled = seed != 0;
  random_order.seed(seed);
}

std::vector<Counters> launches() {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  return counted;
}

Counters counters() {
  Counters all{};
  for (const Counters& one : launches()) {
    all.launches += one.launches;
    all.threads += one.threads;
    all.bytes_read += one.bytes_read;
    all.bytes_written += one.bytes_written;
    all.atomics += one.atomics;
    all.bytes_loaded += one.bytes_loaded;
  }
  return all;
}

void reset_counters() {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  counted.clear();
}

}  // namespace emulation
