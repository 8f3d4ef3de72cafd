#include "checkpoint/transfer/handshake.h"

#include <fmt/format.h>

#include <cstddef>
#include <cstring>

namespace everstep::checkpoint {
namespace {

template <typename Frame>
std::uint64_t Mac(const SipKey& key, std::uint64_t first, std::uint64_t second,
                  const Frame& frame) {
  static_assert(offsetof(Frame, mac) + 8 == sizeof(Frame), "everything before the mac is covered");
  unsigned char bytes[16 + sizeof(Frame) - 8];
  std::memcpy(bytes, &first, 8);
  std::memcpy(bytes + 8, &second, 8);
  std::memcpy(bytes + 16, &frame, sizeof(Frame) - 8);
  return SipHash(key, bytes, sizeof bytes);
}

}  // namespace

Outcome CheckHello(const HelloFrame& hello, const std::string& peer) {
  if (hello.magic != kFrameMagic) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("peer {}: does not speak the checkpoint data plane's protocol", peer)};
  }
  if (hello.version != kTransferVersion) {
    return Error{
        ErrorCode::kInvalid,
        fmt::format("peer {}: speaks version {} of the data plane, this agent version {}; run "
                    "the same release on all nodes",
                    peer, hello.version, kTransferVersion)};
  }
  return Done{};
}

// The two directions differ in the order of the nonces, so that neither can be played back as the
// other.
std::uint64_t RequestMac(const SipKey& key, std::uint64_t client_nonce, std::uint64_t server_nonce,
                         const RequestFrame& request) {
  return Mac(key, client_nonce, server_nonce, request);
}
std::uint64_t ResponseMac(const SipKey& key, std::uint64_t client_nonce, std::uint64_t server_nonce,
                          const ResponseFrame& response) {
  return Mac(key, server_nonce, client_nonce, response);
}
std::uint64_t AckMac(const SipKey& key, std::uint64_t client_nonce, std::uint64_t server_nonce,
                     const AckFrame& ack) {
  return Mac(key, server_nonce, client_nonce, ack);
}

}  // namespace everstep::checkpoint
