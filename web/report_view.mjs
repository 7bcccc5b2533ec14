// Where a report's page is, and the list of them in the panel.

import { api } from "../../scripts/api.js";
import { t } from "./words.mjs";

/** A link to a report's page, which opens beside the graph. */
export function link(name, text) {
  const made = document.createElement("a");
  Object.assign(made, { textContent: text, href: api.apiURL(`/concept_guard/reports/${encodeURIComponent(name)}`) });
  Object.assign(made, { target: "_blank", rel: "noopener", className: "cg-report" });
  made.style.color = "inherit";
  return made;
}

function card(report) {
  const made = Object.assign(document.createElement("div"), { className: "card report" });
  const line = (text, className) =>
    made.append(Object.assign(document.createElement("div"), { textContent: text, className }));
  line(`${report.preset} · ${report.checkpoint}`, "name");
  for (const sentence of report.verdict) line(sentence, "hint");
  made.append(link(report.name, t("Open the report")));
  return made;
}

/** Puts the reports of this server into a place of the page; nothing where there are none. */
export async function drawReports(place) {
  const found = await api.fetchApi("/concept_guard/reports").then((answer) => (answer.ok ? answer.json() : [])).catch(() => []);
  if (!found.length) return place.replaceChildren();
  const title = Object.assign(document.createElement("h3"), { textContent: t("Reports") });
  place.replaceChildren(title, ...found.map(card));
}
