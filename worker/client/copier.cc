#include "worker/client/copier.h"

#include <signal.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>

#include "proto/base/errno_text.h"
#include "proto/base/kill_point.h"

namespace everstep::client {
namespace {

using checkpoint::Error;
using checkpoint::ErrorCode;
using checkpoint::kTensorAlignment;
using checkpoint::Outcome;
using checkpoint::RoundUp;

constexpr std::uint64_t kLook = 8u << 20;  // bytes between two looks at give_up_

}  // namespace

checkpoint::Result<std::unique_ptr<Copier>> Copier::Start() {
  std::unique_ptr<Copier> copier(new Copier);
  sigset_t all, before;  // the trainer's threads take its signals
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int failed = pthread_create(
      &copier->thread_, nullptr,
      [](void* c) -> void* {
        static_cast<Copier*>(c)->Run();
        return nullptr;
      },
      copier.get());
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (failed != 0) {
    return Error{ErrorCode::kInternal,
                 "no thread for overlapped captures: " + ErrnoText(failed) +
                     "; raise the process's limit of threads, or capture in blocking mode"};
  }
  copier->started_ = true;
  pthread_setname_np(copier->thread_, "everstep-copy");
  return copier;
}

Copier::~Copier() {
  if (!started_) return;
  give_up_ = true;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
  }
  begin_.notify_all();
  pthread_join(thread_, nullptr);
}

Outcome Copier::Copy(checkpoint::SlotWriter* writer, const everstep_piece* late,
                     std::uint32_t late_count, const everstep_piece* early,
                     std::uint32_t early_count, const void* tail, std::uint64_t tail_bytes,
                     std::uint64_t* offsets) try {
  writer_ = writer;
  late_.assign(late, late + late_count);
  std::uint64_t at = writer->offset();
  for (std::uint32_t i = 0; i < late_count; ++i) {
    at = RoundUp(at, kTensorAlignment);
    if (offsets != nullptr) offsets[i] = at;
    at += late[i].bytes;
  }
  // What follows is staged as it will lie from the next multiple of the alignment on.
  const std::uint64_t base = RoundUp(at, kTensorAlignment);
  std::uint64_t bytes = 0;
  for (std::uint32_t i = 0; i < early_count; ++i) {
    bytes = RoundUp(bytes, kTensorAlignment) + early[i].bytes;
  }
  bytes = RoundUp(bytes, kTensorAlignment);
  staged_.resize(bytes + tail_bytes);
  std::uint64_t to = 0;
  for (std::uint32_t i = 0; i < early_count; ++i) {
    const std::uint64_t next = RoundUp(to, kTensorAlignment);
    if (next > to) std::memset(staged_.data() + to, 0, next - to);
    to = next;
    if (offsets != nullptr) offsets[late_count + i] = base + to;
    if (early[i].bytes > 0) std::memcpy(staged_.data() + to, early[i].data, early[i].bytes);
    to += early[i].bytes;
  }
  if (bytes > to) std::memset(staged_.data() + to, 0, bytes - to);
  if (tail_bytes > 0) std::memcpy(staged_.data() + bytes, tail, tail_bytes);
  KillPoint("capture.staged");
  give_up_ = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    busy_ = true;
  }
  begin_.notify_one();
  return checkpoint::Done{};
} catch (const std::exception&) {  // the vectors': callers are of C
  return Error{ErrorCode::kNoMemory,
               "an overlapped capture: no memory to stage the early pieces and the table in"};
}

bool Copier::Wait(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  return end_.wait_for(lock, timeout, [this] { return !busy_; });
}

bool Copier::Watch(std::uint64_t* count, std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  const bool changed = end_.wait_for(lock, timeout, [&] { return ended_ != *count; });
  *count = ended_;
  return changed;
}

void Copier::GiveUp() {
  give_up_ = true;
  std::unique_lock<std::mutex> lock(mutex_);
  end_.wait(lock, [this] { return !busy_; });
  ++ended_;
  end_.notify_all();
}

void Copier::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    begin_.wait(lock, [this] { return busy_ || ending_; });
    if (ending_ && !busy_) return;
    lock.unlock();
    outcome_ = Work();
    KillPoint("capture.copied");
    lock.lock();
    busy_ = false;
    ++ended_;
    end_.notify_all();
  }
}

Outcome Copier::Work() {
  const auto append = [this](const void* data, std::uint64_t bytes) -> Outcome {
    if (auto ok = writer_->Align(); !ok.ok()) return ok;
    const auto* from = static_cast<const unsigned char*>(data);
    while (bytes > 0) {
      if (give_up_) return Error{ErrorCode::kStale, "the capture was given up"};
      const std::uint64_t n = std::min(bytes, kLook);
      auto ok = from == nullptr ? writer_->Adopt(n) : writer_->Append(from, n);
      if (!ok.ok()) return ok;
      KillPoint("capture.late_bytes");
      if (from != nullptr) from += n;
      bytes -= n;
    }
    return checkpoint::Done{};
  };
  for (const everstep_piece& piece : late_) {
    if (auto ok = append(piece.data, piece.bytes); !ok.ok()) return ok;
  }
  return append(staged_.data(), staged_.size());
}

}  // namespace everstep::client
