#include "proto/wire/admin_dial.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <cstddef>

namespace everstep::wire {
namespace {

constexpr int kMaxMessageBytes = 64 << 20;
constexpr int kFirstBackoffMs = 50;
constexpr int kLeastAttemptMs = 500;  // one attempt to connect may take
constexpr int kMostBackoffMs = 200;

}  // namespace

std::vector<std::string> SplitAddresses(const std::string& list) {
  std::vector<std::string> addresses;
  for (std::size_t at = 0; at <= list.size();) {
    const std::size_t comma = std::min(list.find(',', at), list.size());
    if (comma > at) addresses.push_back(list.substr(at, comma - at));
    at = comma + 1;
  }
  return addresses;
}

std::unique_ptr<v1::AdminService::Stub> DialAdmin(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);  // a controller is no web site
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kFirstBackoffMs);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kLeastAttemptMs);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kMostBackoffMs);
  // Channels of equal arguments share one connection and its back-off.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return v1::AdminService::NewStub(
      grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
}

}  // namespace everstep::wire
