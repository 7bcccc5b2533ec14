// Where presets are: those of the pack, and each user's own, in the host's per-user files.
//
// A file is never written over: every save takes a new name, so that two browsers saving at once lose nothing.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { t } from "./words.mjs";

export const MAX_BYTES = 2 * 1024 * 1024; // of a file with learned files; the server says what is too much of what
export const FOLDER_SETTING = "ConceptGuard.Presets.Folder";
export const DEFAULT_FOLDER = "concept_guard/presets";

/** The user's folder for presets: plain names only, whatever the setting says. */
export function folder() {
  const asked = String(app.extensionManager?.setting?.get(FOLDER_SETTING) ?? DEFAULT_FOLDER);
  const parts = asked.split("/").filter(Boolean);
  const plain = parts.length > 0 && parts.every((part) => /^[A-Za-z0-9_-][A-Za-z0-9 ._-]*$/.test(part));
  return plain ? parts.join("/") : DEFAULT_FOLDER;
}

/** What the server finds in a document, text or bytes: {ok, name, does, ...} or {ok: false, error}. */
export async function check(document) {
  const size = document?.length ?? document?.byteLength;
  if (!(size <= MAX_BYTES)) return { ok: false, error: t("It is larger than 2 MB.") };
  const answer = await api.fetchApi("/concept_guard/presets/check", { method: "POST", body: document });
  if (!answer.ok) return { ok: false, error: t("The server did not check it ({status}).", answer) };
  return answer.json();
}

/** What a file that somebody brought holds: text, or the bytes of a .safetensors file. */
export async function contentsOf(file) {
  if (file.size > MAX_BYTES) throw new Error(t("It is larger than 2 MB; a preset is smaller."));
  const bytes = await file.arrayBuffer();
  if (file.name.toLowerCase().endsWith(".safetensors")) return bytes;
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Error(t("It is not text; a preset is a .json or .safetensors file that ConceptGuard wrote."));
  }
}

/** Whether a document claims to be a preset: what does not, the canvas leaves to the host. */
export function looksLikePreset(document) {
  try {
    if (typeof document === "string") return JSON.parse(document)?.kind === "concept-guard preset";
    const length = Number(new DataView(document).getBigUint64(0, true));
    const about = JSON.parse(new TextDecoder().decode(new Uint8Array(document, 8, length))).__metadata__;
    return about?.format === "concept-guard" && about.kind === "preset";
  } catch {
    return false;
  }
}

/** The file to share: .safetensors where learned files travel along, else .json. */
export async function exported(preset) {
  if (!JSON.parse(preset.text).files?.length) return [new Blob([preset.text], { type: "application/json" }), "json"];
  const answer = await api.fetchApi("/concept_guard/presets/pack", { method: "POST", body: preset.text });
  if (!answer.ok) throw new Error((await answer.json().catch(() => null))?.error ?? t("It was not made ({status}).", answer));
  return [await answer.blob(), "safetensors"];
}

export const slug = (name) => name.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "preset";

export async function shipped() {
  const answer = await api.fetchApi("/concept_guard/presets");
  return answer.ok ? answer.json() : [];
}

/** The user's own, checked like any other document; what is not a preset is listed with its error. */
export async function own() {
  const base = folder();
  const files = (await api.listUserDataFullInfo(base)).filter((file) => file.path.endsWith(".json"));
  const read = async (file) => {
    const path = `${base}/${file.path}`;
    if (file.size > MAX_BYTES) return { path, text: "", ok: false, error: t("It is larger than 2 MB.") };
    const answer = await api.getUserData(path);
    const text = answer.ok ? await answer.text() : "";
    return { path, text, ...(await check(text)) };
  };
  const all = await Promise.all(files.slice(0, 500).map(read));
  return all.sort((a, b) => (a.name ?? a.path).localeCompare(b.name ?? b.path));
}

const random = () => Array.from(crypto.getRandomValues(new Uint8Array(5)), (b) => b.toString(16).padStart(2, "0")).join("");

/** Store a document that was checked; returns its path. */
export async function keep(text, name) {
  const path = `${folder()}/${slug(name)}-${random()}.json`;
  const answer = await api.storeUserData(path, text, { overwrite: false, stringify: false, throwOnError: false });
  if (!answer.ok) throw new Error(t("It was not stored ({status} {statusText}).", answer));
  return path;
}

export async function remove(path) {
  const answer = await api.deleteUserData(path);
  if (!answer.ok && answer.status !== 404) throw new Error(t("It was not deleted ({status}).", answer));
}

/** A new name: written as a new document first, so that a failure in between leaves both, never none. */
export async function rename(preset, name) {
  const text = JSON.stringify({ ...JSON.parse(preset.text), name }, null, 2);
  const found = await check(text);
  if (!found.ok) throw new Error(found.error);
  await keep(text, found.name);
  await remove(preset.path);
}
