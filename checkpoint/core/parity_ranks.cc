#include "checkpoint/core/parity_ranks.h"

#include <algorithm>

#include "checkpoint/core/parity_groups.h"

namespace everstep::checkpoint {

std::vector<Codeword> CodewordsOf(const std::vector<Rank>& group, std::uint32_t parity,
                                  std::int32_t world) {
  std::vector<std::uint32_t> ranks;
  ranks.reserve(group.size());
  for (const Rank rank : group) ranks.push_back(static_cast<std::uint32_t>(rank));
  std::vector<Codeword> out;
  out.reserve(group.size());
  for (const ParityRow& row : RowsOf(ranks, parity)) {
    Codeword word;
    word.members.assign(row.members.begin(), row.members.end());
    word.parities.reserve(row.holders.size());
    for (std::uint32_t p = 0; p < row.holders.size(); ++p) {
      word.parities.push_back(ParityRank(static_cast<Rank>(row.holders[p]), p, world));
    }
    out.push_back(std::move(word));
  }
  return out;
}

bool Recoverable(const std::vector<Codeword>& codewords, const std::set<Rank>& have) {
  return std::all_of(codewords.begin(), codewords.end(), [&have](const Codeword& word) {
    const auto has = [&have](Rank rank) { return have.count(rank) > 0; };
    const auto lost = static_cast<std::ptrdiff_t>(word.members.size()) -
                      std::count_if(word.members.begin(), word.members.end(), has);
    return lost <= std::count_if(word.parities.begin(), word.parities.end(), has);
  });
}

}  // namespace everstep::checkpoint
