// The planner for a trainer's ranks: libeverstep_plan.so, text in, text out.
//
// Each rank of a pipeline job asks for the same plan itself, from what all of them agreed on, and
// they compare the answers' checksums; so there is no planner process that could be lost.
//
// The request:
//
//   everstep-plan-request 1
//   faults = 1                  copies of each layer, less one
//   most-nodes = 6              the most that the job has had; templates are made up to there
//   microbatches = 12           of a step, all pipelines together
//   horizon-ms = 600000         expected time to the next change; 0: the fastest plan wins
//   nodes = 0,1,2,4             those there are now; any numbers, each once
//   pipeline = ...              of the plan that ends, as its answer had it; none: the first plan
//   profile =                   the rest of the text is the profile (profile.h)
//
// The answer:
//
//   everstep-plan 1
//   fingerprint = b3c0d75c90e1930c       of the templates
//   time-ns = 3560123456                 of a step, as predicted
//   pipeline = 7; 0,3,6,10; 0,1,2        microbatches; where stages begin, and the end; nodes
//   # ...                                a picture of it
//
// A stage lies on one whole node: a node here is what runs one stage, so profiles' devices and
// microbatch are read as 1. A previous pipeline whose division is none of the templates (another
// profile made it) is not kept, its nodes are seated as newcomers.
//
// A book is opened with the request that made the plan now and that plan's own pipelines: it makes
// the answers to the requests that follow if one of the nodes is lost, and if a newcomer takes its
// place (plan_book.h), and keeps the templates for all others.
//
//   newcomer = 7                the number that a newcomer would have; none: losses alone
//
// Pure and deterministic: equal requests, equal answers, on every machine. Thread-safe; a book may
// be asked while one thread makes it.
#pragma once

#include <cstdint>

extern "C" {

// Writes the answer to request[0..bytes) into `answer` with a terminating 0, at most `room` bytes
// of it, and returns the bytes that it needs with the 0: call again with as many when that is more.
// Negative: a refusal, or a request that is not one; its sentences are in `answer`, the number is
// the bytes they need.
__attribute__((visibility("default"))) std::int64_t everstep_plan(const char* request,
                                                                  std::uint64_t bytes, char* answer,
                                                                  std::uint64_t room);

// The book of a plan, with no answer in it yet, but its templates; null: the request is none, or
// has more than 1,024 nodes; the sentence is in `error`, at most `room` bytes of it. Closed by the
// caller.
typedef struct everstep_plan_book everstep_plan_book;
__attribute__((visibility("default"))) everstep_plan_book* everstep_plan_book_open(
    const char* request, std::uint64_t bytes, char* error, std::uint64_t room);

// Makes so many more answers and returns how many are left to make. One thread at a time.
__attribute__((visibility("default"))) std::uint64_t everstep_plan_book_make(
    everstep_plan_book* book, std::uint64_t plans);

// As everstep_plan, the same answer. `how`, unless null: which way it came.
enum {
  EVERSTEP_PLAN_MADE_ANEW = 0,       // templates and all: of another profile, faults or most-nodes
  EVERSTEP_PLAN_WITH_TEMPLATES = 1,  // of the book: not one loss alone, another plan, not made yet
  EVERSTEP_PLAN_FROM_BOOK = 2,
};
__attribute__((visibility("default"))) std::int64_t everstep_plan_book_ask(
    const everstep_plan_book* book, const char* request, std::uint64_t bytes, char* answer,
    std::uint64_t room, std::uint32_t* how);

// REQUIRES that nobody makes it or asks it any more.
__attribute__((visibility("default"))) void everstep_plan_book_close(everstep_plan_book* book);

// Of these calls and texts: 2.
__attribute__((visibility("default"))) std::uint32_t everstep_plan_version();

}  // extern "C"
