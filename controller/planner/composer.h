// Compositions of one library, remembered: the plans for several changes ask for the same ones.
// Pure and deterministic; one owner at a time.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <tuple>

#include "controller/planner/compose.h"

namespace everstep::planner {

class Composer {
 public:
  // `library` must outlive it.
  explicit Composer(const Library& library) : library_(library) {}

  const Library& library() const { return library_; }
  // Compose(library, input). Valid as long as this is.
  const Answer<Composition>& Of(const ComposeInput& input);
  // The same where one copy of each layer is enough: a part of the nodes of a job.
  const Answer<Composition>& OfPart(const ComposeInput& input);

 private:
  using Key = std::tuple<std::uint32_t, std::uint64_t, std::uint32_t>;  // a ComposeInput's fields

  const Library& library_;
  std::optional<Library> of_one_copy_;  // library_, once somebody asked for a part
  std::map<Key, Answer<Composition>> whole_, part_;
};

}  // namespace everstep::planner
