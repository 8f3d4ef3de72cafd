#include "worker/launcher/admin_client.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <grpcpp/grpcpp.h>

#include "proto/wire/admin_dial.h"

namespace everstep::launcher {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using std::chrono::system_clock;

constexpr milliseconds kRedialPause{50};
constexpr milliseconds kRetryPause{20};

CallResult ResultOf(const grpc::Status& status) {
  if (status.ok()) return {};
  CallResult result;
  result.message = status.error_message();
  switch (status.error_code()) {
    case grpc::StatusCode::UNAVAILABLE:
    case grpc::StatusCode::DEADLINE_EXCEEDED:
    case grpc::StatusCode::CANCELLED: result.kind = CallResult::Kind::kUnreachable; break;
    case grpc::StatusCode::ALREADY_EXISTS: result.kind = CallResult::Kind::kExists; break;
    case grpc::StatusCode::NOT_FOUND: result.kind = CallResult::Kind::kNotFound; break;
    default: result.kind = CallResult::Kind::kRefused;
  }
  if (result.message.empty()) result.message = fmt::format("gRPC status {}", status.error_code());
  return result;
}

}  // namespace

struct AdminClient::Impl {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::string> addresses;
  std::size_t current = 0;
  std::shared_ptr<v1::AdminService::Stub> stub;  // of addresses[current]; null: to be made
  grpc::ClientContext* streams[2] = {};          // under way: follow, tail
  bool directed = false;                         // by Redial: the next address is chosen
  bool ending = false;
  bool over[2] = {false, false};  // `streams` that will not be opened again
  std::thread threads[2];

  std::shared_ptr<v1::AdminService::Stub> Stub() {
    std::lock_guard<std::mutex> lock(mutex);
    if (stub == nullptr && !addresses.empty()) {
      stub = wire::DialAdmin(addresses[current]);
    }
    return stub;
  }

  void NextAddress() {
    std::lock_guard<std::mutex> lock(mutex);
    if (addresses.empty() || std::exchange(directed, false)) return;
    current = (current + 1) % addresses.size();
    stub = nullptr;  // also where there is one address only: a new channel has no back-off
  }

  // Tries the addresses in turn until one answers or `limit` passed.
  template <typename Call>
  CallResult Retry(milliseconds limit, Call call) {
    const auto deadline = steady_clock::now() + limit;
    CallResult result{CallResult::Kind::kUnreachable, "no controller is named"};
    while (true) {
      const auto left = std::chrono::duration_cast<milliseconds>(deadline - steady_clock::now());
      if (left.count() <= 0) return result;
      if (auto target = Stub()) {
        grpc::ClientContext context;
        context.set_deadline(system_clock::now() + left);
        result = ResultOf(call(*target, &context));
        if (result.kind != CallResult::Kind::kUnreachable) return result;
      }
      NextAddress();
      std::this_thread::sleep_for(std::min(left, kRetryPause));
    }
  }

  // Runs `stream` again and again until it returns true or the client ends.
  template <typename Stream>
  void Keep(int index, Stream stream) {
    threads[index] = std::thread([this, index, stream] {
      while (true) {
        auto target = Stub();
        grpc::ClientContext context;
        {
          std::lock_guard<std::mutex> lock(mutex);
          if (ending) return;
          streams[index] = &context;
        }
        const bool done = target != nullptr && stream(*target, &context);
        std::unique_lock<std::mutex> lock(mutex);
        streams[index] = nullptr;
        over[index] = done;
        if (done || changed.wait_for(lock, kRedialPause, [this] { return ending; })) return;
        lock.unlock();
        NextAddress();
      }
    });
  }

  void End() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      ending = true;
      for (grpc::ClientContext* context : streams) {
        if (context != nullptr) context->TryCancel();
      }
    }
    changed.notify_all();
    for (std::thread& thread : threads) {
      if (thread.joinable()) thread.join();
    }
    std::lock_guard<std::mutex> lock(mutex);
    ending = false;
  }
};

AdminClient::AdminClient(const std::string& addresses) : impl_(std::make_unique<Impl>()) {
  impl_->addresses = wire::SplitAddresses(addresses);
}

AdminClient::~AdminClient() {
  impl_->End();
}

void AdminClient::SetAddresses(const std::string& addresses) {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  std::vector<std::string> split = wire::SplitAddresses(addresses);
  if (split == impl_->addresses || split.empty()) return;
  std::string in_use;
  if (!impl_->addresses.empty()) in_use = impl_->addresses[impl_->current];
  impl_->addresses = std::move(split);
  const auto kept = std::find(impl_->addresses.begin(), impl_->addresses.end(), in_use);
  if (kept != impl_->addresses.end()) {  // what runs there runs on
    impl_->current = static_cast<std::size_t>(kept - impl_->addresses.begin());
    return;
  }
  impl_->current = 0;
  impl_->stub = nullptr;
  for (grpc::ClientContext* context : impl_->streams) {
    if (context != nullptr) context->TryCancel();
  }
}

void AdminClient::Redial(const std::string& address) {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  const auto found = std::find(impl_->addresses.begin(), impl_->addresses.end(), address);
  if (found != impl_->addresses.end()) {
    impl_->current = static_cast<std::size_t>(found - impl_->addresses.begin());
    impl_->stub = nullptr;
    impl_->directed = true;
  }
  for (grpc::ClientContext* context : impl_->streams) {
    if (context != nullptr) context->TryCancel();
  }
}

std::string AdminClient::address() const {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->addresses.empty() ? std::string() : impl_->addresses[impl_->current];
}

CallResult AdminClient::Status(v1::ClusterStatus* status, milliseconds limit) {
  return impl_->Retry(limit, [&](v1::AdminService::Stub& stub, grpc::ClientContext* context) {
    return stub.GetStatus(context, v1::GetStatusRequest(), status);
  });
}

CallResult AdminClient::Submit(const v1::JobSpec& spec, std::string* job, milliseconds limit) {
  v1::SubmitJobRequest request;
  *request.mutable_spec() = spec;
  v1::SubmitJobReply reply;
  CallResult result =
      impl_->Retry(limit, [&](v1::AdminService::Stub& stub, grpc::ClientContext* context) {
        return stub.SubmitJob(context, request, &reply);
      });
  *job = reply.job();
  return result;
}

CallResult AdminClient::List(v1::JobList* jobs, milliseconds limit) {
  return impl_->Retry(limit, [&](v1::AdminService::Stub& stub, grpc::ClientContext* context) {
    return stub.ListJobs(context, v1::ListJobsRequest(), jobs);
  });
}

CallResult AdminClient::Cancel(const std::string& job, const std::string& reason,
                               milliseconds limit) {
  v1::CancelJobRequest request;
  request.set_job(job);
  request.set_reason(reason);
  v1::CancelJobReply reply;
  return impl_->Retry(limit, [&](v1::AdminService::Stub& stub, grpc::ClientContext* context) {
    return stub.CancelJob(context, request, &reply);
  });
}

CallResult AdminClient::Shutdown(milliseconds limit) {
  v1::ShutdownReply reply;
  return impl_->Retry(limit, [&](v1::AdminService::Stub& stub, grpc::ClientContext* context) {
    return stub.Shutdown(context, v1::ShutdownRequest(), &reply);
  });
}

void AdminClient::Follow(const std::string& job, bool with_snapshot,
                         std::function<void(v1::JobStatus)> take,
                         std::function<void(const CallResult&)> lost) {
  v1::FollowJobRequest request;
  request.set_job(job);
  request.set_with_snapshot(with_snapshot);
  impl_->Keep(0, [request, take = std::move(take), lost = std::move(lost)](
                     v1::AdminService::Stub& stub, grpc::ClientContext* context) {
    auto reader = stub.FollowJob(context, request);
    v1::JobStatus status;
    bool over = false;
    while (reader->Read(&status)) {
      over = IsTerminal(status);
      take(std::move(status));
      status.Clear();
    }
    const CallResult why = ResultOf(reader->Finish());
    if (!over) lost(why);
    return over;
  });
}

void AdminClient::Tail(const std::string& job, std::function<void(const v1::JobLogLines&)> take) {
  v1::TailJobLogsRequest request;
  request.set_job(job);
  request.set_rank(-1);
  request.set_follow(true);
  request.set_tail_lines(-1);
  // Where a broken stream is taken up again, lines of before would be shown twice: then only new
  // ones.
  auto seen = std::make_shared<bool>(false);
  impl_->Keep(1, [request, seen, take = std::move(take)](v1::AdminService::Stub& stub,
                                                         grpc::ClientContext* context) {
    v1::TailJobLogsRequest again = request;
    if (*seen) again.set_tail_lines(0);
    auto reader = stub.TailJobLogs(context, again);
    v1::JobLogLines lines;
    while (reader->Read(&lines)) {
      *seen = true;
      take(lines);
    }
    return reader->Finish().ok();
  });
}

bool AdminClient::TailEnded() const {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->over[1];
}

void AdminClient::EndFollow() {
  impl_->End();
}

}  // namespace everstep::launcher
