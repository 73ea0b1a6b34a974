// What llama.cpp's Vulkan backend takes from headers of 1.3.272 and later, for Debian 12, which has 1.3.239: settings of a
// validation layer that is not loaded. Drivers pass over a structure that they do not know.

#pragma once

#include <vector>
#include <vulkan/vulkan_core.h>

#if VK_HEADER_VERSION < 272
namespace vk {

enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char *        layer;
    const char *        setting;
    LayerSettingTypeEXT type;
    uint32_t            n_values;
    const void *        values;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings)
        : n_settings((uint32_t) settings.size()), settings(settings.data()) {}

    VkStructureType         type = (VkStructureType) 1000496000;
    const void *            next = nullptr;
    uint32_t                n_settings;
    const LayerSettingEXT * settings;
};

} // namespace vk
#endif
