// How two data planes prove to each other that they know a job's key: macs over both sides' nonces.
#pragma once

#include <cstdint>
#include <string>

#include "checkpoint/store/result.h"
#include "checkpoint/transfer/frame.h"
#include "checkpoint/transfer/siphash.h"

namespace everstep::checkpoint {

Outcome CheckHello(const HelloFrame& hello, const std::string& peer);
std::uint64_t RequestMac(const SipKey& key, std::uint64_t client_nonce, std::uint64_t server_nonce,
                         const RequestFrame& request);
std::uint64_t ResponseMac(const SipKey& key, std::uint64_t client_nonce, std::uint64_t server_nonce,
                          const ResponseFrame& response);
std::uint64_t AckMac(const SipKey& key, std::uint64_t client_nonce, std::uint64_t server_nonce,
                     const AckFrame& ack);

}  // namespace everstep::checkpoint
