// Finish times of messages under SimGrid's fluid model: max-min fair links, latency as a delay before moving.
// Reads from stdin: the number of links, their rates [bytes/s]; the number of messages, and for each its begin [s],
// bytes, number of links and these links. Writes SimGrid's version, the seconds it ran, and each message's finish [s].
// Build: g++ -O2 -std=c++17 simgrid_flows.cpp -lsimgrid     (Debian's libsimgrid-dev 3.32, or SimGrid 4.1)
#include <simgrid/s4u.hpp>
#include <simgrid/version.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
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
  sg::Host* from = nullptr;
};

int main(int argc, char** argv)
{
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
  // One host per message, whose way up holds the whole route; all go to one sink.
  auto* sink = ADD(zone, host, "sink", 1e9);
  sink->seal();
  zone->add_route(nullptr, sink->get_netpoint(), nullptr, nullptr, std::vector<sg::LinkInRoute>{}, false);
  std::cin >> num_messages;
  std::vector<Message> messages(num_messages);
  for (size_t i = 0; i < num_messages; i++) {
    size_t num_hops;
    std::cin >> messages[i].begin >> messages[i].bytes >> num_hops;
    std::vector<sg::LinkInRoute> route;
    for (size_t hop = 0; hop < num_hops; hop++) {
      size_t link;
      std::cin >> link;
      route.emplace_back(links[link]);
    }
    messages[i].from = ADD(zone, host, "host" + std::to_string(i), 1e9);
    messages[i].from->seal();
    zone->add_route(messages[i].from->get_netpoint(), nullptr, nullptr, nullptr, route, false);
  }
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
        sent.emplace_back(&message, sg::Comm::sendto_async(message.from, sink, static_cast<uint64_t>(message.bytes)));
      }
      for (auto& [message, comm] : sent) {
        comm->wait();
        message->finish = comm->get_finish_time();
      }
    };
    ACTOR(sink, send);
  }
  auto since = std::chrono::steady_clock::now();
  engine.run();
  std::chrono::duration<double> took = std::chrono::steady_clock::now() - since;
  std::printf("%d %.6f\n", SIMGRID_VERSION, took.count());
  for (auto const& message : messages)
    std::printf("%.17g\n", message.finish);
  return 0;
}
