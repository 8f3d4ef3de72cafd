// What parity costs in processor time, beside a plain copy of the same bytes.
//
//   parity_bench [--runs 11] [--json FILE]
//
// Case: a policy. One thread, shards of 32 MiB that no cache holds, added in chunks of 1 MiB as
// they would arrive. `encode`: bytes of shards added to one parity, a second. `decode`: bytes of
// shards and parities added to bring back one shard, a second. Beside them memcpy of as many bytes.
// The three take turns, so that what else the machine does meets all of them.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "checkpoint/codec/parity_code.h"
#include "checkpoint/core/redundancy.h"
#include "proto/base/clock.h"
#include "tests/bench/results.h"

namespace everstep::bench {
namespace {

using checkpoint::ParityCode;
using checkpoint::ParityDecoder;
using Bytes = std::vector<std::byte>;

constexpr std::size_t kShard = std::size_t{32} << 20, kChunk = std::size_t{1} << 20;
constexpr double kGiB = 1 << 30;

template <typename Work>
double Seconds(const Work& work) {
  const std::int64_t began = MonotonicNanos();
  work();
  return static_cast<double>(MonotonicNanos() - began) / 1e9;
}

// False: what was decoded is not what was lost.
bool Case(const checkpoint::Redundancy& policy, int runs, Results* results) {
  const std::string name = checkpoint::PrintRedundancy(policy);
  const std::uint32_t k = policy.shards;
  const ParityCode code(k, policy.parity);
  std::vector<Bytes> shards(k, Bytes(kShard));
  std::uint64_t word = 1;
  for (Bytes& shard : shards) {
    for (std::size_t i = 0; i + sizeof word <= shard.size(); i += sizeof word) {
      word = word * 6364136223846793005ULL + 1442695040888963407ULL;
      std::memcpy(shard.data() + i, &word, sizeof word);
    }
  }
  const auto chunks = [](const Bytes& from, std::byte* into, const auto& add) {
    for (std::size_t at = 0; at < kShard; at += kChunk) {
      add(std::span(from).subspan(at, kChunk), into + at);
    }
  };
  const auto decoder = ParityDecoder::Make(code, {0}, {policy.parity - 1});
  if (!decoder) return false;
  Bytes parity(kShard), back(kShard);
  const double bytes = static_cast<double>(k * kShard) / kGiB;
  for (int run = -1; run < runs; ++run) {  // the first fills caches and page tables
    std::memset(parity.data(), 0, kShard);
    const double encode = Seconds([&] {
      for (std::uint32_t j = 0; j < k; ++j) {
        chunks(shards[j], parity.data(),
               [&](auto from, std::byte* into) { code.Add(policy.parity - 1, j, from, into); });
      }
    });
    std::memset(back.data(), 0, kShard);
    const double decode = Seconds([&] {
      for (std::uint32_t j = 1; j < k; ++j) {
        chunks(shards[j], back.data(),
               [&](auto from, std::byte* into) { decoder->AddShard(0, j, from, into); });
      }
      chunks(parity, back.data(), [&](auto from, std::byte* into) {
        decoder->AddParity(0, policy.parity - 1, from, into);
      });
    });
    if (back != shards[0]) return false;
    const double copy = Seconds([&] {
      for (const Bytes& shard : shards) {
        chunks(shard, back.data(),
               [](auto from, std::byte* into) { std::memcpy(into, from.data(), from.size()); });
      }
    });
    if (run < 0) continue;
    results->Add(name, "everstep", "encode", "GiB/s", bytes / encode);
    results->Add(name, "everstep", "decode", "GiB/s", bytes / decode);
    results->Add(name, "memcpy", "copy", "GiB/s", bytes / copy);
    results->Add(name, "everstep", "encode, of memcpy", "x", copy / encode);
    results->Add(name, "everstep", "decode, of memcpy", "x", copy / decode);
  }
  return true;
}

int Main(int argc, char** argv) {
  int runs = 11;
  std::string json;
  if (const auto code = ReadFlags(argc, argv, "parity_bench", &runs, &json)) return *code;
  Results results("parity");
  for (const checkpoint::Redundancy policy :
       {checkpoint::Redundancy{4, 1}, checkpoint::Redundancy{4, 2}, checkpoint::Redundancy{8, 3}}) {
    if (Case(policy, runs, &results)) continue;
    fmt::print(stderr, "error: {} does not bring back what was lost\n",
               checkpoint::PrintRedundancy(policy));
    return 1;
  }
  return results.Finish(json);
}

}  // namespace
}  // namespace everstep::bench

int main(int argc, char** argv) {
  return everstep::bench::Main(argc, argv);
}
