// Any bytes under a good checksum become a record that survives its own encoding, or an error text;
// any bytes become a snapshot's records or a refusal.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "controller/store/convert.h"
#include "proto/base/check.h"
#include "proto/base/crc32c.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace everstep::controller;  // NOLINT: the store's functions
  using everstep::Crc32c;
  using everstep::Crc32cExtend;
  if (size == 0) return 0;
  const std::string payload(reinterpret_cast<const char*>(data) + 1, size - 1);
  const RecordKey key{static_cast<Deletion::Table>(data[0] % 5), "key"};
  const char table = static_cast<char>(key.table);
  const std::uint32_t crc = Crc32cExtend(Crc32cExtend(Crc32c(&table, 1), key.key), payload);
  std::string value(1, static_cast<char>(kRecordFormat));
  for (int i = 0; i < 4; ++i) value += static_cast<char>((crc >> (8 * i)) & 0xFF);
  Record record;
  const StoreStatus status = DecodeRecord(key, value + payload, &record);
  EVERSTEP_CHECK(status.ok() || !status.message.empty());
  if (status.ok()) {
    Record again;
    EVERSTEP_CHECK(DecodeRecord(KeyOf(record), EncodeRecord(record), &again).ok());
    EVERSTEP_CHECK(EncodeRecord(again) == EncodeRecord(record));
  }
  EVERSTEP_CHECK(!DecodeRecord(key, payload, &record).ok() || payload.size() >= 5);
  everstep::v1::StoreSnapshot snapshot;
  std::vector<Record> records;
  if (snapshot.ParseFromString(payload)) (void)FromSnapshot(snapshot, &records);
  return 0;
}
