// The live page: runs the model while a text is typed. All text from the server is set as textContent.
"use strict";
(() => {
  const get = (id) => document.getElementById(id);
  const { run, models, ends, missing } = JSON.parse(get("data").textContent);
  const fields = Object.fromEntries(["model", "layer", "neuron", "text", "operation", "value", "count"].map((id) => [id, get(id)]));
  const marks = { " ": "␣", "\n": "⏎", "\t": "⇥" };
  const shown = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}]/gu, (c) => `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`);
  const visible = (text) => shown(text.replace(/[ \n\t]/g, (c) => marks[c]));
  let maximum = 1, position = null, current = null, units = [];
  get("live").hidden = false;

  // ---- state is stored in the address, so that it can be shared ----
  const query = new URLSearchParams(location.search);
  if (query.get("model") in models) fields.model.value = query.get("model");
  const fill = () => {
    const layers = Object.keys(models[fields.model.value]);
    const before = fields.layer.value || query.get("layer");
    fields.layer.replaceChildren(...layers.map((n) => new Option(n, n)));
    if (layers.includes(before)) fields.layer.value = before;
    // with two ends, a neuron is written as 17+ or 17-, which is no number
    fields.neuron.type = ends[fields.model.value] ? "text" : "number";
    fields.neuron.max = models[fields.model.value][fields.layer.value] - 1;
  };
  fill();
  let chosen = query.has("neuron");  // if not, the strongest neuron at the last token is selected first
  for (const id of ["neuron", "text", "operation", "value", "count"]) if (query.has(id)) fields[id].value = query.get(id);
  const remember = () => {
    const state = new URLSearchParams(Object.entries(fields).map(([id, field]) => [id, field.value]));
    if (state.toString().length < 3000) history.replaceState(null, "", `?${state}`);
    const path = [fields.model, fields.layer, fields.neuron].map((f) => encodeURIComponent(f.value));
    get("page").href = `/r/${encodeURIComponent(run)}/neuron/${path.join("/")}`;
  };

  // ---- requests: one of each kind at a time; a new request cancels the previous one ----
  // An answer can arrive after the fields have changed: `turn` counts the updates, and what belongs to an earlier one
  // is not shown.
  const pending = {};
  let turn = 0, explaining = 0;
  const cancel = () => { turn += 1; clearTimeout(explaining); for (const control of Object.values(pending)) control.abort(); };
  const ask = async (kind, body) => {
    pending[kind]?.abort();
    const control = (pending[kind] = new AbortController());
    const response = await fetch(`/api/r/${encodeURIComponent(run)}/live/${kind}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, signal: control.signal,
      body: JSON.stringify({ model: fields.model.value, text: fields.text.value, ...body }),
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error ?? "the server did not answer");
    return answer;
  };
  const neuron = () => ({ layer: Number(fields.layer.value), neuron: fields.neuron.value || "0" });
  const withStatus = async (work) => {
    const started = turn;
    try { await work(); } catch (error) { if (error.name !== "AbortError" && started === turn) get("status").textContent = error.message; }
  };
  const level = (value, top) => (value > 0 && top > 0 ? Math.max(1, Math.min(10, Math.round((10 * value) / top))) : 0);
  const element = (tag, text, kind) => { const node = document.createElement(tag); node.textContent = text; if (kind) node.className = kind; return node; };
  const button = (span, label, choose) => {
    span.tabIndex = 0;
    span.setAttribute("role", "button");
    span.setAttribute("aria-label", label);
    span.addEventListener("click", choose);
    span.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); } });
  };
  const replaceSpans = (place, spans) => {  // the focus stays where it is
    const focused = [...place.children].indexOf(document.activeElement);
    place.replaceChildren(...spans);
    if (focused >= 0) spans[Math.min(focused, spans.length - 1)]?.focus();
  };
  const chance = (token, [first, second]) => {  // a row with two probabilities; both are [label, value]
    const row = document.createElement("tr");
    const bars = document.createElement("td");
    bars.className = "bars";
    for (const [[label, value], kind] of [[first, "before"], [second, "after"]]) {
      const bar = element("meter", "", kind);
      Object.assign(bar, { min: 0, max: 1, value });
      bar.setAttribute("aria-label", `${label}, ${(100 * value).toFixed(1)}%`);
      bars.append(bar);
    }
    row.append(element("td", visible(token), "token"), element("td", (100 * first[1]).toFixed(2), "r"), element("td", (100 * second[1]).toFixed(2), "r"), bars);
    return row;
  };
  const linkTo = (layer, name) => {
    const link = element("a", name);
    link.href = `/r/${encodeURIComponent(run)}/neuron/${encodeURIComponent(fields.model.value)}/${layer}/${encodeURIComponent(name)}`;
    return link;
  };

  // tokens that make a character together are one unit of text, on which all of them are named
  const has = (start, stop, at) => at !== null && start <= at && at < stop;
  const parts = (tokens, start, stop, value) => (stop - start < 2 ? "" : ` · ${stop - start} tokens: ${tokens.slice(start, stop).map((token, i) => `${token} ${value(start + i)}`).join(", ")}`);
  const read = () => withStatus(async () => {
    const answer = await ask("activations", neuron());
    const largest = Math.max(answer.maximum, ...answer.values);
    if (answer.maximum !== maximum) { maximum = answer.maximum; scale(); }
    const spans = answer.units.map(({ start, stop, text }) => {  // a unit stands for its token with the largest activation
      const values = answer.values.slice(start, stop);
      const value = Math.max(...values);
      const index = start + values.indexOf(value);
      const shade = level(value, largest);
      const span = element("span", visible(text), shade ? `l${shade}` : "");
      span.title = `${value.toPrecision(3)}${parts(answer.tokens, start, stop, (at) => answer.values[at].toPrecision(3))}`;
      if (has(start, stop, position)) span.classList.add("peak");
      button(span, `token ${index}, ${visible(text)}, activation ${value.toPrecision(3)}`, () => { position = index; read(); strongest(); });
      return span;
    });
    current = answer.tokens;
    units = answer.units;
    replaceSpans(get("tokens"), spans);
    const top = Math.max(...answer.values);
    get("status").textContent = `${answer.tokens.length} tokens${answer.cut ? ` (${answer.cut} more do not fit into the model's context)` : ""}; largest activation ${top.toPrecision(3)}, ${answer.maximum > 0 ? `${Math.round((100 * top) / answer.maximum)}% of the neuron's maximum` : "of a dead neuron"}`;
  });

  const select = (n) => { chosen = true; fields.layer.value = n.layer; fill(); fields.neuron.value = n.name; };
  const strongest = () => withStatus(async () => {
    if (!current?.length) return;
    if (position === null || position >= current.length) position = current.length - 1;
    const neurons = await ask("strongest", { position });
    if (!chosen && neurons.length) select(neurons[0]);
    get("at").textContent = visible(units.find((u) => has(u.start, u.stop, position))?.text ?? "");
    get("strongest").replaceChildren(...neurons.map((n) => {
      const row = document.createElement("tr");
      const cell = element("td", "", "r");
      cell.append(linkTo(n.layer, n.name));
      row.append(element("td", String(n.layer), "r"), cell, element("td", (100 * n.share).toFixed(0), "r"), element("td", n.value.toPrecision(3), "r"), element("td", shown(n.explanation) || "–", "text wide"));
      const selecting = element("button", "select", "select");
      selecting.type = "button";
      selecting.setAttribute("aria-label", `select neuron ${n.name} of layer ${n.layer}`);
      selecting.addEventListener("click", () => { select(n); get("neuron").focus(); all(); });
      cell.append(" ", selecting);
      return row;
    }));
  });

  const scale = () => {
    const kind = fields.operation.value;
    fields.value.disabled = kind === "zero";
    const top = kind === "scale" ? 4 : 2 * Math.max(maximum, 1e-6);
    const share = Number(fields.value.value) / Number(fields.value.max || 1);
    Object.assign(fields.value, { min: kind === "add" ? -top : 0, max: top, step: top / 200 });
    if (Number(fields.value.value) > top || share === 1) fields.value.value = top / 2;
  };
  const steer = () => withStatus(async () => {
    get("shown").textContent = fields.operation.value === "zero" ? "0" : Number(fields.value.value).toPrecision(3);
    const effect = await ask("steer", { ...neuron(), operation: fields.operation.value, value: Number(fields.value.value), tokens: Math.min(64, Math.max(0, Math.round(Number(fields.count.value) || 0))) });
    get("kl").textContent = `Steering changes the prediction of the next token by ${effect.kl.toPrecision(3)} nats (KL divergence).`;
    get("chances").replaceChildren(...effect.chances.map((t) => chance(t.token, [["before", t.before], ["after", t.after]])));
    get("plain").textContent = visible(effect.plain);
    let same = 0;
    while (same < effect.steered.length && effect.steered[same] === effect.plain[same]) same += 1;
    get("steered").replaceChildren(document.createTextNode(visible(effect.steered.slice(0, same))), element("mark", visible(effect.steered.slice(same))));
  });

  // ---- the model on its explanations: `predicted` is the chosen token, null for the one with the largest difference ----
  let predicted = null;
  const full = 4;  // nats of difference at which the shade is darkest
  const short = (value) => (value === 0 ? "0" : value.toPrecision(2));
  const signed = (nats) => `${nats < 0 ? "−" : "+"}${Math.abs(nats).toFixed(2)}`;
  const probable = (of) => `${visible(of.likely)} ${(100 * of.probability).toFixed(0)}%`;
  const explain = () => withStatus(async () => {
    const problem = missing[fields.model.value];
    get("explained").hidden = Boolean(problem);
    get("missing").hidden = !problem;
    get("missing").textContent = problem ? `${fields.model.value} cannot run on its explanations: ${problem}` : "";
    if (problem) return;
    const answer = await ask("explained", {});
    const lost = answer.tokens.map((t) => (t.model.loss === null ? null : t.explained.loss - t.model.loss));
    const last = lost.length - 1;
    if (predicted === null || predicted > last) predicted = lost.indexOf(Math.max(...lost.slice(0, last)));
    const names = answer.tokens.map((t) => t.token);
    replaceSpans(get("losses"), [...answer.units, { start: last, stop: last + 1, text: "…" }].map(({ start, stop, text }) => {
      const end = start === last;
      const name = end ? text : visible(text);
      const sizes = lost.slice(start, stop).map(Math.abs);  // a unit stands for its token with the largest difference
      const index = start + sizes.indexOf(Math.max(...sizes));
      const t = answer.tokens[index];
      const sum = end ? 0 : lost.slice(start, stop).reduce((a, b) => a + b, 0);
      const shade = level(Math.abs(sum), full);
      const span = element("span", name, shade ? `${sum < 0 ? "w" : "l"}${shade}` : "");
      span.title = `${end ? "the next token" : `${signed(sum)} nats`} · model: ${probable(t.model)} · on explanations: ${probable(t.explained)}${parts(names, start, stop, (at) => signed(lost[at]))}`;
      if (has(start, stop, predicted)) span.classList.add("peak");
      button(span, end ? "the token that comes next" : `token ${index}, ${name}, ${signed(sum)} nats on explanations`, () => { predicted = index; explain(); });
      return span;
    }));
    get("explainer").textContent = answer.explainer;
    get("sums").textContent = `Mean over these ${last} tokens: a loss of ${answer.loss.toFixed(2)} nats per token by the model, ${answer.loss_explained.toFixed(2)} on its explanations.`;
    const found = await ask("predicted", { position: predicted });
    get("target").textContent = predicted === last ? "…" : visible(found.target);
    const target = `“${visible(found.target)}”${predicted === last ? ", the model's first choice" : ""}`;
    get("both").textContent = `Loss of ${target}: ${found.loss.toFixed(2)} nats by the model, ${found.loss_explained.toFixed(2)} on explanations (${signed(found.loss_explained - found.loss)}). The two predictions differ by ${found.kl.toFixed(2)} nats (KL divergence).`;
    get("predictions").replaceChildren(...found.tokens.map((t) => {
      const row = chance(t.token, [["model", t.model], ["on explanations", t.explained]]);
      if (t.is_actual) { row.className = "actual"; row.firstChild.append(element("span", "in the text", "note")); }
      return row;
    }));
    get("costs").replaceChildren(...found.neurons.map((n) => {
      const row = document.createElement("tr");
      const cell = element("td", "", "r");
      cell.append(linkTo(n.layer, n.name));
      const where = element("td", "", "token");
      if (n.position < 0) where.append(element("span", "start", "faint"));
      else where.append(element("span", visible(n.context.slice(0, -1).join("")), "faint"), visible(n.context.at(-1)));
      row.append(element("td", signed(n.cost), "r"), element("td", String(n.layer), "r"), cell, where, element("td", short(n.true), "r"), element("td", short(n.predicted), "r"), element("td", shown(n.explanation) || "–", "text wide"));
      return row;
    }));
    const dropped = found.dropped ? ` ${signed(found.dropped)} nats are lost because the autoencoders do not reconstruct everything.` : "";
    const decide = found.layers.length < Object.keys(models[fields.model.value]).length ? ` Only the explanations of layer ${found.layers.join(", ")} decide: nothing passes round the activations of that layer.` : "";
    const unexplained = found.neurons.some((n) => !n.explanation) ? " –: not explained in words; “cratelm explain --neurons 0” explains all neurons." : "";
    get("rest").textContent = `All other neurons together: ${signed(found.others)} nats.${dropped}${decide}${unexplained}`;
  });

  // ---- updates after a change; quick successive changes cause one update ----
  let timer = 0;
  const later = (work, wait = 250) => { clearTimeout(timer); timer = setTimeout(work, wait); };
  const all = async () => {
    cancel();
    const started = turn;
    remember();
    if (!fields.text.value) { get("status").textContent = "Enter a text."; return; }
    const before = chosen;
    if (!current) get("status").textContent = "Loading the model …";
    for (const work of [read, strongest]) { await work(); if (started !== turn) return; }
    if (chosen !== before) { remember(); await read(); }
    if (started === turn) await steer();
    if (started !== turn) return;
    clearTimeout(explaining);  // later than the others, so that fast typing stays within the server's rate limit
    explaining = setTimeout(explain, first ? 0 : 400);
    first = false;
  };
  let first = true;
  fields.text.addEventListener("input", () => { position = predicted = null; later(all, 350); });
  fields.model.addEventListener("change", () => { current = predicted = null; fill(); later(all, 0); });
  fields.layer.addEventListener("change", () => { chosen = true; fill(); later(all, 0); });
  fields.neuron.addEventListener("input", () => { chosen = true; later(all); });
  for (const id of ["operation", "value", "count"]) fields[id].addEventListener("input", () => { if (id === "operation") scale(); get("shown").textContent = Number(fields.value.value).toPrecision(3); later(() => { remember(); steer(); }, 200); });
  scale();
  all();
})();
