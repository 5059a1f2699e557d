// Finish times of messages under SimGrid's fluid model: max-min fair links, latency as a delay before moving.
// Reads from stdin: the number of links, their rates [bytes/s]; the number of ways up, and for each the number of its
// links and these; the same of ways down; the number of messages, and for each its begin [s], bytes, way up, way down.
// Writes SimGrid's version, the processor seconds it ran, and each message's finish [s].
// Build: g++ -O2 -std=c++17 simgrid_flows.cpp -lsimgrid     (Debian's libsimgrid-dev 3.32, or SimGrid 4.1)
#include <simgrid/s4u.hpp>
#include <simgrid/version.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <iostream>
#include <numeric>
#include <string>
#include <vector>

namespace sg = simgrid::s4u;

#if SIMGRID_VERSION >= 40100
#define ADD(zone, kind, name, rate) (zone)->add_##kind(name, rate)
#define ZONE() sg::Engine::get_instance()->get_netzone_root()->add_netzone_star("fabric")
#define ACTOR(host, body) (host)->add_actor("sender", body)
#else
#define ADD(zone, kind, name, rate) (zone)->create_##kind(name, rate)
#define ZONE() sg::create_star_zone("fabric")
#define ACTOR(host, body) sg::Actor::create("sender", host, body)
#endif

struct Message {
  double begin, bytes, finish = 0.0;
  size_t up, down;
};

int main(int argc, char** argv)
{
  std::ios::sync_with_stdio(false);
  sg::Engine engine(&argc, argv);
  auto* zone = ZONE();
  size_t num_links, num_messages;
  std::cin >> num_links;
  std::vector<sg::Link*> links;
  for (size_t i = 0; i < num_links; i++) {
    double rate;
    std::cin >> rate;
    links.push_back(ADD(zone, link, "link" + std::to_string(i), rate));
    links.back()->set_latency(0.0)->seal();
  }
  // A host for each way up and each way down: a message goes from one to the other.
  std::vector<sg::Host*> ends[2];
  for (int down = 0; down < 2; down++) {
    size_t num_ways;
    std::cin >> num_ways;
    for (size_t i = 0; i < num_ways; i++) {
      size_t num_hops, link;
      std::cin >> num_hops;
      std::vector<sg::LinkInRoute> way;
      for (size_t hop = 0; hop < num_hops; hop++) {
        std::cin >> link;
        way.emplace_back(links[link]);
      }
      auto* host = ADD(zone, host, (down ? "down" : "up") + std::to_string(i), 1e9);
      host->seal();
      auto* point = host->get_netpoint();
      zone->add_route(down ? nullptr : point, down ? point : nullptr, nullptr, nullptr, way, false);
      ends[down].push_back(host);
    }
  }
  std::cin >> num_messages;
  std::vector<Message> messages(num_messages);
  for (auto& message : messages)
    std::cin >> message.begin >> message.bytes >> message.up >> message.down;
  zone->seal();

  std::vector<size_t> order(num_messages);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return messages[a].begin < messages[b].begin; });
  const size_t few = 64; // SimGrid 3.32 keeps an actor's messages in a list that it searches
  for (size_t first = 0; first < num_messages; first += few) {
    auto send = [&, first]() {
      std::vector<std::pair<Message*, sg::CommPtr>> sent;
      for (size_t at = first; at < std::min(num_messages, first + few); at++) {
        Message& message = messages[order[at]];
        if (message.begin > sg::Engine::get_clock())
          sg::this_actor::sleep_until(message.begin);
        sent.emplace_back(&message, sg::Comm::sendto_async(ends[0][message.up], ends[1][message.down],
                                                                static_cast<uint64_t>(message.bytes)));
      }
      for (auto& [message, comm] : sent) {
        comm->wait();
        message->finish = comm->get_finish_time();
      }
    };
    ACTOR(ends[0][0], send);
  }
  const std::clock_t since = std::clock();
  engine.run();
  const double took = static_cast<double>(std::clock() - since) / CLOCKS_PER_SEC;
  std::printf("%d %.6f\n", SIMGRID_VERSION, took);
  for (auto const& message : messages)
    std::printf("%.17g\n", message.finish);
  return 0;
}
