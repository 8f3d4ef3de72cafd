// A keeper's and an agent's part of the checkpoint plane in one process: holds arenas, serves
// attach requests on a unix socket, runs the production TransferService over them. For tests of
// what lives in a trainer, where a whole node would only be in the way.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "checkpoint/store/arena.h"
#include "checkpoint/transfer/transfer_service.h"
#include "worker/keeper/attach_protocol.h"

namespace everstep::testing {

class ArenaHost final : public checkpoint::ArenaHost {
 public:
  explicit ArenaHost(std::string socket) : path_(std::move(socket)) {
    listener_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.data(),
                std::min(path_.size(), sizeof address.sun_path - 1));
    ok_ = bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 &&
          listen(listener_, 64) == 0;
    wake_ = eventfd(0, EFD_CLOEXEC);
    thread_ = std::thread([this] { Serve(); });
  }
  ~ArenaHost() override {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = write(wake_, &one, sizeof one);
    thread_.join();
    for (auto& [key, fds] : arenas_) {
      close(fds.memfd);
      close(fds.eventfd);
    }
    close(listener_);
    close(wake_);
    unlink(path_.c_str());
  }
  bool ok() const { return ok_; }

  checkpoint::Result<std::vector<checkpoint::ArenaName>> List(const JobId& job) override {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<checkpoint::ArenaName> out;
    for (auto& [key, fds] : arenas_) {
      if (key.first == job) out.push_back(key.second);
    }
    return out;
  }
  checkpoint::Result<checkpoint::ArenaFds> Open(const JobId& job, const checkpoint::ArenaName& name,
                                                std::uint64_t slot_bytes) override {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = arenas_.find({job, name});
    if (it == arenas_.end()) {
      if (slot_bytes == 0)
        return checkpoint::Error{checkpoint::ErrorCode::kNotFound, "no such arena"};
      auto fd = checkpoint::CreateArenaFd({job, name.rank, name.replica, slot_bytes});
      if (!fd.ok()) return fd.error();
      const checkpoint::ArenaFds fds{fd.value(), eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)};
      it = arenas_.emplace(std::pair(job, name), fds).first;
    }
    return checkpoint::ArenaFds{fcntl(it->second.memfd, F_DUPFD_CLOEXEC, 0),
                                fcntl(it->second.eventfd, F_DUPFD_CLOEXEC, 0)};
  }
  void Drop(const JobId& job, const checkpoint::ArenaName& name) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = arenas_.find({job, name});
    if (it == arenas_.end()) return;
    close(it->second.memfd);
    close(it->second.eventfd);
    arenas_.erase(it);
  }

 private:
  void Serve() {
    for (;;) {
      pollfd fds[2] = {{listener_, POLLIN, 0}, {wake_, POLLIN, 0}};
      if (poll(fds, 2, -1) < 0) continue;
      if (fds[1].revents != 0) return;
      const int client = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (client < 0) continue;
      keeper::AttachRequest request;
      if (recv(client, &request, sizeof request, MSG_WAITALL) == sizeof request)
        Answer(client, request);
      close(client);
    }
  }
  void Answer(int client, const keeper::AttachRequest& request) {
    keeper::AttachReply reply;
    auto fds = Open(request.job, {request.rank, false}, request.slot_bytes);
    alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
    iovec iov{&reply, sizeof reply};
    msghdr message{};
    message.msg_iov = &iov;
    message.msg_iovlen = 1;
    if (fds.ok()) {
      reply.slot_bytes = request.slot_bytes;
      message.msg_control = control;
      message.msg_controllen = sizeof control;
      cmsghdr* c = CMSG_FIRSTHDR(&message);
      c->cmsg_level = SOL_SOCKET;
      c->cmsg_type = SCM_RIGHTS;
      c->cmsg_len = CMSG_LEN(2 * sizeof(int));
      const int both[2] = {fds.value().memfd, fds.value().eventfd};
      std::memcpy(CMSG_DATA(c), both, sizeof both);
    } else {
      reply.error = fds.error().code == checkpoint::ErrorCode::kNoMemory ? ENOMEM : EIO;
      std::strncpy(reply.message, fds.error().message.c_str(), sizeof reply.message - 1);
    }
    [[maybe_unused]] const ssize_t n = sendmsg(client, &message, MSG_NOSIGNAL);
    if (fds.ok()) {
      close(fds.value().memfd);
      close(fds.value().eventfd);
    }
  }

  const std::string path_;
  int listener_ = -1;
  int wake_ = -1;
  bool ok_ = false;
  std::mutex mutex_;
  std::map<std::pair<JobId, checkpoint::ArenaName>, checkpoint::ArenaFds> arenas_;
  std::thread thread_;
};

}  // namespace everstep::testing
