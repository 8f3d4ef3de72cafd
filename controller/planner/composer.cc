#include "controller/planner/composer.h"

namespace everstep::planner {

const Answer<Composition>& Composer::Of(const ComposeInput& input) {
  const Key key{input.nodes, input.microbatches, input.pipelines};
  const auto found = whole_.find(key);
  if (found != whole_.end()) return found->second;
  return whole_.emplace(key, Compose(library_, input)).first->second;
}

const Answer<Composition>& Composer::OfPart(const ComposeInput& input) {
  if (!of_one_copy_) {
    of_one_copy_ = library_;
    of_one_copy_->input.faults = 0;
    of_one_copy_->fewest_nodes = library_.least_nodes;
  }
  const Key key{input.nodes, input.microbatches, input.pipelines};
  const auto found = part_.find(key);
  if (found != part_.end()) return found->second;
  return part_.emplace(key, Compose(*of_one_copy_, input)).first->second;
}

}  // namespace everstep::planner
