// The multi-tensor CUDA kernels as the host code sees them: no torch and no CUDA types.
#pragma once

#include "../../common/ema_math.h"
#include "../../common/tensor_table.h"
#include "../core/queue.h"

namespace fastvlp::cuda {

constexpr int64_t kEmaChunk = 8192;  // elements of a block

// The decay: a value in device memory, float or double, or else a number.
struct Decay {
  const void* at;  // null: `value`
  bool wide;
  double value;
};

// Each queues one launch over a table in device memory and returns null, or CUDA's error
// message. Nothing is written where `nonfinite` (device memory, may be null) is not -1, or where
// the decay in device memory is not between 0 and 1.
const char* ema_update(Queue queue, const TableView& table, Decay decay, const int64_t* nonfinite);
const char* adamw_ema(Queue queue, const TableView& table, const AdamWFactors& factors, Decay decay,
                      const int64_t* nonfinite);
// *last = the last position with an element that exceeds the limit, else -1.
const char* last_exceeding(Queue queue, const TableView& table, float limit, int64_t* last);

// Whether work on this stream is being captured into a graph.
bool is_capturing(Queue queue);

// A CUDA event: a point in the work of a stream.
class Event {
 public:
  Event() = default;
  Event(Event&& other) noexcept : event_(other.event_) { other.event_ = nullptr; }
  Event& operator=(Event&&) = delete;
  ~Event();

  // Records it behind all that has been queued so far. Returns null, or CUDA's error message.
  const char* record(Queue queue);
  // Whether the device has reached it; may be asked while a graph is captured.
  bool query() const;

 private:
  void* event_ = nullptr;  // a cudaEvent_t
};

}  // namespace fastvlp::cuda
