// How a client reaches AdminService. Brings gRPC's headers: for the .cc of a client only.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "admin.grpc.pb.h"

namespace everstep::wire {

// "host:port[,host:port...]"; empty parts are left out.
std::vector<std::string> SplitAddresses(const std::string& list);

// A channel of its own, without another's back-off: a controller that restarts is found at once.
// Connects at the first call. Never null.
std::unique_ptr<v1::AdminService::Stub> DialAdmin(const std::string& address);

}  // namespace everstep::wire
