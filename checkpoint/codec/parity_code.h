// Parity over shards of state: r parities over k shards, any k of those k + r bring back the rest.
//
// Everything is a sum over GF(2^8) (polynomial x^8 + x^4 + x^3 + x^2 + 1, as in ISA-L and RAID 6):
//
//   parity[p] = sum over shards j of factor(p, j) * shard[j]
//   lost shard = sum over what is left of another factor * that
//
// so a holder adds what comes, when it comes, a chunk at a time and in any order, into one buffer
// of the longest shard's length that began as zeros; a shorter shard counts as padded with zeros.
// Adding the same bytes twice takes them out again (the sum is its own inverse): whoever adds must
// know what it has added.
//
// factor(p, j) is 1 for one parity (plain XOR), else Cauchy's 1 / ((k + p) xor j): every square
// part of that matrix can be inverted, which is why any r losses can be undone. The factors depend
// on k and p alone, so encoder and decoder need to agree on nothing else.
//
// Source: Cauchy Reed-Solomon as in ISA-L (gf_gen_cauchy1_matrix); the arithmetic is ISA-L's.
// Immutable after construction; all functions may be called by several threads at once on different
// `into`. Nothing is allocated in Add and MultiplyAdd.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace everstep::checkpoint {

// A byte to multiply by, expanded for the processor's vector unit.
class Factor {
 public:
  explicit Factor(std::uint8_t value);
  std::uint8_t value() const { return value_; }

 private:
  friend void MultiplyAdd(const Factor& factor, std::span<const std::byte> from, std::byte* into);
  std::uint8_t value_;
  alignas(32) std::array<std::uint8_t, 32> table_;
};

// into[i] += factor * from[i] for each byte of `from`. Any length and alignment; they may not
// overlap. About as fast as memory: two bytes read and one written for each.
void MultiplyAdd(const Factor& factor, std::span<const std::byte> from, std::byte* into);

class ParityCode {
 public:
  // REQUIRES shards >= 1, parity >= 1, shards + parity <= 256.
  ParityCode(std::uint32_t shards, std::uint32_t parity);

  std::uint32_t shards() const { return shards_; }
  std::uint32_t parity() const { return parity_; }
  // REQUIRES p < parity(), shard < shards().
  const Factor& factor(std::uint32_t p, std::uint32_t shard) const {
    return factors_[p * shards_ + shard];
  }
  // Adds a piece of a shard to the same place of parity p.
  void Add(std::uint32_t p, std::uint32_t shard, std::span<const std::byte> from,
           std::byte* into) const {
    MultiplyAdd(factor(p, shard), from, into);
  }

 private:
  std::uint32_t shards_, parity_;
  std::vector<Factor> factors_;  // by parity, then shard
};

// How lost shards come back: each is a sum over the shards that are not lost and as many parities
// as are lost.
class ParityDecoder {
 public:
  // `lost`: shards, each once; `parities`: those that can be had, each once; all in range. Nullopt:
  // fewer parities than lost shards, so they are gone. Takes the first parities that suffice.
  static std::optional<ParityDecoder> Make(const ParityCode& code, std::vector<std::uint32_t> lost,
                                           std::vector<std::uint32_t> parities);

  const std::vector<std::uint32_t>& lost() const { return lost_; }
  // Those that it reads, as many as are lost.
  const std::vector<std::uint32_t>& parities() const { return parities_; }
  // Adds a piece of a shard that is left, or of one of parities(), to the same place of the l-th of
  // lost(). A lost shard shorter than the parity ends before it: what comes beyond is zeros.
  // REQUIRES l < lost().size(); the shard is not lost; p is one of parities().
  void AddShard(std::uint32_t l, std::uint32_t shard, std::span<const std::byte> from,
                std::byte* into) const;
  void AddParity(std::uint32_t l, std::uint32_t p, std::span<const std::byte> from,
                 std::byte* into) const;

 private:
  ParityDecoder() = default;

  std::uint32_t shards_ = 0;
  std::vector<std::uint32_t> lost_, parities_;
  std::vector<Factor> of_shard_;   // by l, then shard; of lost ones 0
  std::vector<Factor> of_parity_;  // by l, then index into parities_
};

}  // namespace everstep::checkpoint
