// What the operator's policy does on this server, read-only, on top of the panel; nothing where there is none.

import { api } from "../../scripts/api.js";
import { t } from "./words.mjs";

function make(tag, text, className = "", ...children) {
  const made = Object.assign(document.createElement(tag), { className });
  made.textContent = text;
  made.append(...children);
  return made;
}

const verdicts = () => ({ edited: t("edited"), closed: t("gates closed"), passed: t("let pass"), refused: t("refused"), failed: t("failed") });
const clock = (entry) => new Date(entry.time).toLocaleTimeString();

function line(entry) {
  const words = [clock(entry), verdicts()[entry.verdict], entry.model, entry.why].filter(Boolean);
  const made = make("li", words.join(" · "));
  for (const did of entry.did) made.append(make("div", did, "hint"));
  return made;
}

const folded = (title, entries) =>
  make("details", "", "", make("summary", title), make("ul", "", "", ...entries.map(line)));

/** The server's answer as a card. */
export function card(found) {
  const rows = [make("div", t("This server's policy"), "name")];
  rows.push(found.error ? make("div", found.error, "error") : make("div", found.governs, "about"));
  const count = found.refused_count ?? 0;
  rows.push(count ? folded(t("Refused today: {count}", { count }), [...found.refused].reverse())
    : make("div", t("Nothing was refused today."), "hint"));
  if (found.last?.length) rows.push(folded(t("The last runs"), found.last));
  return make("div", "", "card policy", ...rows);
}

/** Puts the card of a policy that is on into a place of the page. */
export async function drawPolicy(place) {
  const found = await api.fetchApi("/concept_guard/policy").then((answer) => (answer.ok ? answer.json() : null)).catch(() => null);
  place.replaceChildren(...(found?.on ? [card(found)] : []));
}
