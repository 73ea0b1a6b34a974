// Interventions: which experts a token gets is changed on request. The scores that top-k selects on are
// overwritten just before it, and restored after it where the mixing weights are taken from them.
//
// An intervention is a file, TRACE/interventions/NUMBER.bin, written whole before the ring's control word names it:
//
//   offset 0            intervention_header
//          32           intervention_rule[n_rules]
//          ...          expert ids, u16 each, where the rules say
//
// All numbers are little-endian. moetrace/trace/intervention.py writes it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moetrace {

constexpr char     INTERVENTION_MAGIC[8] = { 'M', 'O', 'E', 'T', 'I', 'N', 'T', 'V' };
constexpr uint32_t INTERVENTION_VERSION  = 1;
constexpr uint16_t NO_EXPERT             = 0xFFFF; // in a replay: nothing was recorded here

enum intervention_kind : uint32_t {
    INTERVENE_ABLATE = 0, // score -inf: never chosen
    INTERVENE_FORCE  = 1, // above all others: always chosen
    INTERVENE_BIAS   = 2, // value is added to the score
    INTERVENE_REPLAY = 3, // exactly these, in this order, by position
};

struct intervention_header {
    char     magic[8];
    uint32_t version;
    uint32_t n_rules;
    uint64_t file_size;
    uint32_t crc;      // CRC-32 (zlib) of everything behind the header
    uint32_t reserved;
};
static_assert(sizeof(intervention_header) == 32, "part of the file format");

struct intervention_rule {
    uint32_t kind;        // intervention_kind
    int32_t  sequence;    // whose tokens; -1: everybody's
    int32_t  first_layer; // llama.cpp's numbers; -1: all layers
    int32_t  last_layer;
    float    value;       // bias
    int32_t  position;    // replay: of the first row of ids
    uint32_t n_rows;      // replay: positions; otherwise 1
    uint32_t n_ids;       // ids per row
    uint64_t offset;      // of the ids, from the start of the file
    uint64_t reserved;

    bool has_layer(int layer)  const { return first_layer < 0 || (layer >= first_layer && layer <= last_layer); }
    bool is_about(int32_t whose) const { return sequence < 0 || sequence == whose; }
};
static_assert(sizeof(intervention_rule) == 48, "part of the file format");

// what an intervention has to know of a layer's router
struct router_shape {
    int  layer        = 0;
    int  n_expert     = 0;
    int  k            = 0;
    int  n_group      = 0; // groups of experts of which the best are chosen first; 0: none
    int  n_group_used = 0;
    bool selects      = true; // its experts are chosen by top-k of scores
};

// When a rule is applied: where experts are chosen in groups, forced and replayed ones may lie in any group.
enum intervention_stage : uint32_t {
    STAGE_SCORES = 1u << 0, // ablate, bias: before the groups are chosen
    STAGE_CHOICE = 1u << 1, // force, replay: just before the experts are
};

class intervention {
  public:
    // Takes a file's bytes; false, with the reason, if they are not an intervention.
    bool parse(std::vector<uint8_t> bytes, std::string & error);
    bool read(const std::string & path, std::string & error);

    // Whether routers of these shapes can do what it asks for.
    bool fits(const std::vector<router_shape> & routers, std::string & error) const;

    bool is_empty() const { return rules.empty(); }
    void clear() { rules.clear(); }

    bool has_layer(int layer) const;
    // Whether it does something to this token.
    bool touches(int32_t sequence, int32_t position) const;
    // Changes one token's scores, of n_expert experts.
    void apply(int layer, uint32_t stages, int32_t sequence, int32_t position, float * scores, int n_expert);

  private:
    const uint16_t * ids_at(const intervention_rule & rule, int64_t position) const; // nullptr: nothing recorded
    bool fits_router(const router_shape & router, int32_t sequence, std::string & error) const;

    std::vector<uint8_t>           file;
    std::vector<intervention_rule> rules;
    std::vector<uint16_t>          forced; // scratch
};

} // namespace moetrace
