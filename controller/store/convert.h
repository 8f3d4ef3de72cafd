// The core's records as proto/record.proto, and back: the only place that knows both. Pure
// functions, thread-safe.
#pragma once

#include <string>
#include <string_view>

#include "admin.pb.h"
#include "controller/store/record_store.h"
#include "record.pb.h"

namespace everstep::controller {

inline constexpr std::uint32_t kRecordFormat = 1;

void ToProto(const NodeRecord& from, v1::NodeRecord* to);
void ToProto(const JobRecord& from, v1::JobRecord* to);
void ToProto(const GenerationRecord& from, v1::GenerationRecord* to);
void ToProto(const CommitRecord& from, v1::CommitRecord* to);
void ToProto(const JournalRecord& from, v1::JournalRecord* to);
void ToProto(const LedgerRecord& from, v1::LedgerRecord* to);
void ToProto(const LedgerFinding& from, v1::LedgerRecord::Finding* to);
void ToProto(const LayoutRecord& from, v1::LayoutRecord* to);
void ToProto(const ToldRecord& from, v1::ToldRecord* to);

// False: a number names nothing this version knows (health, state, phase, reason): the record is
// corrupt.
bool FromProto(const v1::NodeRecord& from, NodeRecord* to);
bool FromProto(const v1::JobRecord& from, JobRecord* to);
bool FromProto(const v1::GenerationRecord& from, GenerationRecord* to);
bool FromProto(const v1::CommitRecord& from, CommitRecord* to);
bool FromProto(const v1::JournalRecord& from, JournalRecord* to);
bool FromProto(const v1::LedgerRecord& from, LedgerRecord* to);
bool FromProto(const v1::LayoutRecord& from, LayoutRecord* to);
bool FromProto(const v1::ToldRecord& from, ToldRecord* to);

// Also as submitted.
void ToProto(const JobSpec& from, v1::JobSpec* to);
void FromProto(const v1::JobSpec& from, JobSpec* to);

// One record's value in the store: format byte, CRC32C (little-endian, over table, key and
// payload), payload. The key is in the checksum so that a value under another's key is not taken
// for its own.
std::string EncodeRecord(const Record& record);
// `key` as KeyOf gave it. Not ok: kCorrupt or kTooNew, with a text that names the record.
StoreStatus DecodeRecord(const RecordKey& key, std::string_view value, Record* out);

// The CRC32C of a plan as persisted: agents echo it in logs, two plans with one number are equal.
std::uint32_t PlanCrc(const GenerationPlan& plan);

// All but the journal. False: a record in it is not understood.
void ToSnapshot(const std::vector<Record>& records, v1::StoreSnapshot* to);
bool FromSnapshot(const v1::StoreSnapshot& from, std::vector<Record>* out);

}  // namespace everstep::controller
