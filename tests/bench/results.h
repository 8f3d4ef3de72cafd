// What C++ benchmarks share with tests/bench/common.py: samples, the table, the JSON file.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <fmt/format.h>

namespace everstep::bench {

// --runs N and --json FILE, the flags of most benchmarks; *runs: the default. Nothing: go on. Else
// the usage was printed, and this is the exit code.
inline std::optional<int> ReadFlags(int argc, char** argv, const char* program, int* runs,
                                    std::string* json) {
  const int usual = *runs;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (i + 1 < argc && flag == "--runs") {
      *runs = std::max(1, std::atoi(argv[++i]));
    } else if (i + 1 < argc && flag == "--json") {
      *json = argv[++i];
    } else {
      fmt::print(stderr, "usage: {} [--runs {}] [--json FILE]\n", program, usual);
      return flag == "--help" ? 0 : 2;
    }
  }
  return std::nullopt;
}

class Results {
 public:
  explicit Results(std::string benchmark) : benchmark_(std::move(benchmark)) {}

  // Samples of one (case, system, metric) are one row, in the order in which they first came.
  void Add(const std::string& name, const std::string& system, const std::string& metric,
           const std::string& unit, double value) {
    const Key key{name, system, metric, unit};
    const auto found = std::find_if(rows_.begin(), rows_.end(),
                                    [&key](const auto& row) { return row.first == key; });
    if (found != rows_.end()) {
      found->second.push_back(value);
    } else {
      rows_.push_back({key, {value}});
    }
  }

  void Print() const {
    fmt::print("\n{}: {}\n{:<24}{:<18}{:<28}{:>12}{:>12}{:>12}  {:<8}{:>4}\n", benchmark_,
               Machine(), "CASE", "SYSTEM", "METRIC", "MEDIAN", "MIN", "MAX", "UNIT", "RUNS");
    for (const auto& [key, values] : rows_) {
      const auto& [name, system, metric, unit] = key;
      const auto [least, most] = std::minmax_element(values.begin(), values.end());
      fmt::print("{:<24}{:<18}{:<28}{:>12}{:>12}{:>12}  {:<8}{:>4}\n", name, system, metric,
                 Number(Median(values)), Number(*least), Number(*most), unit, values.size());
    }
  }

  bool Write(const std::string& path) const {
    std::string rows;
    for (const auto& [key, values] : rows_) {
      const auto& [name, system, metric, unit] = key;
      const auto [least, most] = std::minmax_element(values.begin(), values.end());
      rows += fmt::format(
          "{}\n {{\"case\": \"{}\", \"system\": \"{}\", \"metric\": \"{}\", \"unit\": \"{}\", "
          "\"median\": {}, \"min\": {}, \"max\": {}, \"runs\": {}}}",
          rows.empty() ? "" : ",", name, system, metric, unit, Median(values), *least, *most,
          values.size());
    }
    std::ofstream out(path);
    out << fmt::format("{{\"benchmark\": \"{}\", \"machine\": \"{}\", \"rows\": [{}]}}\n",
                       benchmark_, Machine(), rows);
    return static_cast<bool>(out.flush());
  }

  // The end of a benchmark: prints, and writes to `json` unless that is empty. Its exit code.
  int Finish(const std::string& json) const {
    Print();
    if (json.empty() || Write(json)) return 0;
    fmt::print(stderr, "error: cannot write {}\n", json);
    return 1;
  }

 private:
  using Key = std::tuple<std::string, std::string, std::string, std::string>;

  static double Median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    const std::size_t half = v.size() / 2;
    return v.size() % 2 == 1 ? v[half] : (v[half - 1] + v[half]) / 2;
  }
  static std::string Number(double v) {
    return v >= 1000 ? fmt::format("{:.0f}", v) : fmt::format("{:.4g}", v);
  }
  static std::string Machine() {
    std::ifstream in("/proc/cpuinfo");
    std::string model = "unknown processor";
    for (std::string line; std::getline(in, line);) {
      if (line.starts_with("model name")) {
        model = line.substr(line.find(':') + 2);
        break;
      }
    }
    std::string load;
    std::ifstream("/proc/loadavg") >> load;
    return fmt::format("{} cores, {}, load {}", std::thread::hardware_concurrency(), model, load);
  }

  std::string benchmark_;
  std::vector<std::pair<Key, std::vector<double>>> rows_;
};

}  // namespace everstep::bench
