// A value of the planner, or why there is none and the smallest change that would make one.
#pragma once

#include <string>
#include <utility>
#include <variant>

namespace everstep::planner {

struct Refusal {
  std::string what;    // one sentence with the number that is wrong, no full stop
  std::string change;  // what would work; may be empty
};

template <typename T>
class [[nodiscard]] Answer {
 public:
  Answer(T value) : state_(std::move(value)) {}            // NOLINT: a value is an answer
  Answer(Refusal refusal) : state_(std::move(refusal)) {}  // NOLINT: a refusal is an answer

  bool ok() const { return state_.index() == 0; }
  T& value() { return std::get<0>(state_); }                      // REQUIRES ok()
  const T& value() const { return std::get<0>(state_); }          // REQUIRES ok()
  const Refusal& refusal() const { return std::get<1>(state_); }  // REQUIRES !ok()

 private:
  std::variant<T, Refusal> state_;
};

}  // namespace everstep::planner
