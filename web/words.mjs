// The words that the pack's own parts of the page use. English is in the code, and the key to the other languages, which
// are in locales/<language>/main.json: the host hands out those of all packs.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const languages = await api.fetchApi("/i18n").then((answer) => answer.json()).catch(() => ({}));

/** A text in the language of the settings, with `values` in its {holes}; in English where nobody translated it. */
export function t(english, values = {}) {
  const text = languages[app.extensionManager?.setting?.get("Comfy.Locale")]?.conceptGuard?.[english] ?? english;
  return text.replace(/\{(\w+)\}/g, (hole, name) => values[name] ?? hole);
}
