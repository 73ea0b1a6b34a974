#include "check.h"
#include "config.h"

#include <cstdlib>

using namespace moetrace;

static config parse(const char * text) {
    config cfg;
    std::string error;
    CHECK(config_parse(text, cfg, error));
    return cfg;
}

static std::string refusal(const char * text) {
    config cfg;
    std::string error;
    CHECK(!config_parse(text, cfg, error));
    CHECK(!error.empty());
    return error;
}

int main() {
    const config cfg = parse("trace=/tmp/t\ncapture=weights,tensor:l_out-*,logits\nlayers=0-2,7\ncollector=callback\n"
        "on_full=overwrite\nring_size=4096\nblock_ms=5\npaused=1\n");
    CHECK(cfg.dir == "/tmp/t");
    CHECK(cfg.channels == (CHANNEL_EXPERTS | CHANNEL_WEIGHTS | CHANNEL_LOGITS)); // experts always
    CHECK(cfg.tensors.size() == 1 && cfg.tensors[0] == "l_out-*");
    CHECK(cfg.has_layer(0) && cfg.has_layer(2) && cfg.has_layer(7) && !cfg.has_layer(3) && !cfg.has_layer(8));
    CHECK(cfg.collector == COLLECTOR_CALLBACK && cfg.on_full == RING_OVERWRITE);
    CHECK(cfg.ring_bytes == 4096 && cfg.block_ns == 5'000'000 && cfg.paused);

    CHECK(parse("").has_layer(123)); // all layers by default
    CHECK(refusal("capture=wieghts").find("wieghts") != std::string::npos);
    CHECK(refusal("layers=5-2").find("layers") == 0);
    CHECK(refusal("layers=a").find("'a'") != std::string::npos);
    refusal("layers=-1");
    refusal("collector=tape");
    refusal("on_full=");
    refusal("ring_size=99999999999999999999");
    refusal("nonsense=1");

    setenv("MOETRACE_TRACE", "/tmp/env", 1);
    setenv("MOETRACE_ON_FULL", "drop", 1);
    const config env = parse(config_from_env().c_str());
    CHECK(env.dir == "/tmp/env" && env.on_full == RING_DROP);
    return 0;
}
