// Stands in for the programs of a cluster, by the name it is called: small real processes that
// behave as the supervisor expects of them (files, children, signals) and do nothing else.
#include <arpa/inet.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "controller/cli/supervisor.h"

namespace {

std::string Option(int argc, char** argv, const std::string& name) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (name == argv[i]) return argv[i + 1];
  }
  return "";
}

int Controller(int argc, char** argv) {
  const std::string dir = Option(argc, argv, "--state-dir");
  std::ofstream(dir + "/starts", std::ios::app) << "x";
  const std::string listen = Option(argc, argv, "--listen");
  if (::access((dir + "/../../broken").c_str(), F_OK) == 0) {
    std::fprintf(stderr, "the store is broken\n");
    return 3;
  }
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int yes = 1;
  ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port =
      htons(static_cast<uint16_t>(std::atoi(listen.substr(listen.rfind(':') + 1).c_str())));
  socklen_t size = sizeof(address);
  if (::bind(fd, reinterpret_cast<sockaddr*>(&address), size) != 0 || ::listen(fd, 1) != 0)
    return 4;
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  const std::string file = Option(argc, argv, "--address-file");
  std::ofstream(file + ".tmp") << "127.0.0.1:" << ntohs(address.sin_port) << "\n";
  std::rename((file + ".tmp").c_str(), file.c_str());
  for (;;) ::pause();
}

pid_t keeper = 0;

int Agent(int argc, char** argv, const std::string& folder) {
  const std::string dir =
      Option(argc, argv, "--state-dir") + "/nodes/" + Option(argc, argv, "--node");
  std::ofstream(dir + "/starts", std::ios::app) << "x";
  std::ifstream(dir + "/keeper.pid") >> keeper;
  if (keeper <= 0 || ::kill(keeper, 0) != 0) {
    if (::fork() == 0) {
      ::setsid();
      const std::string program = folder + "/everstep-keeper";
      const std::string socket = dir + "/keeper.sock";
      if (::fork() == 0) {
        ::execl(program.c_str(), program.c_str(), "--socket", socket.c_str(), "--dir", dir.c_str(),
                nullptr);
      }
      ::_exit(0);
    }
    for (int i = 0; i < 5000 && ::access((dir + "/keeper.sock").c_str(), F_OK) != 0; ++i)
      ::usleep(1000);
    std::ifstream(dir + "/keeper.pid") >> keeper;
  }
  std::signal(SIGTERM, [](int) {
    ::kill(keeper, SIGKILL);
    ::_exit(0);
  });
  for (;;) ::pause();
}

int Keeper(int argc, char** argv) {
  const std::string dir = Option(argc, argv, "--dir");
  std::ofstream(dir + "/keeper.pid") << ::getpid() << "\n";
  const pid_t worker = ::fork();
  if (worker == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    // NOLINTNEXTLINE(concurrency-mt-unsafe): before any thread
    ::setenv("EVERSTEP_KEEPER", (dir + "/keeper.sock").c_str(), 1);
    ::execl("/bin/sleep", "sleep", "1000", nullptr);
    ::_exit(127);
  }
  std::ofstream(dir + "/keeper.sock") << "";
  for (;;) ::pause();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string path = argv[0];
  const std::string name = path.substr(path.rfind('/') + 1);
  if (name == "everstep-controller") return Controller(argc, argv);
  if (name == "everstep-agent") return Agent(argc, argv, path.substr(0, path.rfind('/')));
  if (name == "everstep-keeper") return Keeper(argc, argv);
  if (argc == 4 && std::strcmp(argv[2], "supervise") == 0) {
    return everstep::cli::Supervise(argv[3],
                                    {{"PATH", "/bin"}, {"EVERSTEP_CONTROLLER", "elsewhere"}});
  }
  return 2;
}
