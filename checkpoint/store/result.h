// A value, or the error text a person reads in its place. Used by all of checkpoint/ and the client
// library, which links neither abseil nor gRPC.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>

#include "proto/base/errno_text.h"

namespace everstep::checkpoint {

enum class ErrorCode : std::uint8_t {
  kInvalid,      // the caller's or the peer's bytes make no sense
  kNotFound,     // no such arena, slot or step
  kNoMemory,     // the machine or the control group has less than was asked for
  kCorrupt,      // a checksum disagrees
  kStale,        // fenced: an older generation, step or writer
  kUnavailable,  // a peer or the agent does not answer; trying again may help
  kTimedOut,
  kRefused,   // the peer knows better: wrong key, wrong job, too many connections
  kInternal,  // the operating system refused; the text has errno's name
};
const char* ErrorCodeName(ErrorCode code);  // "no_memory"

struct Error {
  ErrorCode code = ErrorCode::kInternal;
  std::string message;  // who, what, the limit, what to do next
};

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}      // NOLINT: a value is a result
  Result(Error error) : state_(std::move(error)) {}  // NOLINT: an error is a result

  bool ok() const { return state_.index() == 0; }
  T& value() { return std::get<0>(state_); }                  // REQUIRES ok()
  const T& value() const { return std::get<0>(state_); }      // REQUIRES ok()
  const Error& error() const { return std::get<1>(state_); }  // REQUIRES !ok()

 private:
  std::variant<T, Error> state_;
};

struct Done {};  // success without a value
using Outcome = Result<Done>;

}  // namespace everstep::checkpoint
