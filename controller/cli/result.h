// A value, or the error that a person reads in its place.
#pragma once

#include <utility>
#include <variant>

#include "controller/cli/error.h"

namespace everstep::cli {

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}         // NOLINT: a value is a result
  Result(CliError error) : state_(std::move(error)) {}  // NOLINT: an error is a result

  bool ok() const { return state_.index() == 0; }
  T& value() { return std::get<0>(state_); }                     // REQUIRES ok()
  const T& value() const { return std::get<0>(state_); }         // REQUIRES ok()
  const CliError& error() const { return std::get<1>(state_); }  // REQUIRES !ok()

 private:
  std::variant<T, CliError> state_;
};

struct Done {};  // success without a value
using Outcome = Result<Done>;

}  // namespace everstep::cli
