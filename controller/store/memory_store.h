// A RecordStore in memory: what tests and single-process uses need. Same order, same semantics, no
// file.
#pragma once

#include <map>

#include "controller/store/record_store.h"

namespace everstep::controller {

class MemoryStore final : public RecordStore {
 public:
  explicit MemoryStore(std::string cluster = "memory");

  StoreStatus Load(std::vector<Record>* out) override;
  StoreStatus Write(std::span<const Record> records, std::span<const Deletion> deletions) override;
  const StoreInfo& info() const override { return info_; }
  std::string Describe() const override { return "memory"; }

  std::size_t size() const { return records_.size(); }
  std::uint64_t batches() const { return batches_; }

 private:
  StoreInfo info_;
  std::map<RecordKey, Record> records_;
  std::uint64_t batches_ = 0;
};

// Passes everything to `inner` until told to fail. `inner` must outlive it.
class FaultStore final : public RecordStore {
 public:
  explicit FaultStore(RecordStore* inner) : inner_(inner) {}

  // After `writes` more good ones, the next Write answers `status`. `applied`: the batch reached
  // the disk all the same (the error came after it), which a caller cannot tell. It then goes on
  // failing until Heal().
  void FailAfter(std::uint64_t writes, StoreStatus status, bool applied = false);
  void Heal() { armed_ = false; }

  StoreStatus Load(std::vector<Record>* out) override { return inner_->Load(out); }
  StoreStatus Write(std::span<const Record> records, std::span<const Deletion> deletions) override;
  const StoreInfo& info() const override { return inner_->info(); }
  std::string Describe() const override { return inner_->Describe(); }

 private:
  RecordStore* inner_;
  bool armed_ = false;
  bool applied_ = false;
  std::uint64_t left_ = 0;
  StoreStatus status_;
};

}  // namespace everstep::controller
