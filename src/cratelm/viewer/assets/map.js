// The map of a layer: zoom and pan by wheel, buttons, touch and keys; details of a neuron on hover and focus; groups.
// The map can be read without this script, which asks nothing of other servers.
"use strict";
(() => {
  const box = document.getElementById("mapbox");
  if (!box) return;
  const svg = box.querySelector("svg.map"), panel = document.getElementById("map-neuron"), hint = document.getElementById("map-hint");
  const whole = svg.viewBox.baseVal, WIDTH = whole.width, HEIGHT = whole.height, MOST = 12;
  const neurons = [...svg.querySelectorAll(".n")].map((node, at) => {
    const circle = node.querySelector("circle"), title = node.querySelector("title");
    node.setAttribute("aria-label", `neuron ${title.textContent}`);
    const name = title.textContent;
    title.remove(); // the panel takes its place
    return { node, at, name, x: circle.cx.baseVal.value, y: circle.cy.baseVal.value, index: name.split(" ", 1)[0] };
  });
  if (!neurons.length) return;

  const labels = [...svg.querySelectorAll(".labels > g")].map((node) => ({ node, from: Number(node.getAttribute("class").slice(1)) / 10 }));
  svg.classList.add("scripted");

  // ---- the visible part of the map ----
  const view = { x: 0, y: 0, zoom: 1 };
  const show = () => {
    view.zoom = Math.min(MOST, Math.max(1, view.zoom));
    const width = WIDTH / view.zoom, height = HEIGHT / view.zoom;
    view.x = Math.min(WIDTH - width, Math.max(0, view.x));
    view.y = Math.min(HEIGHT - height, Math.max(0, view.y));
    svg.setAttribute("viewBox", `${view.x} ${view.y} ${width} ${height}`);
    const unit = width / (svg.clientWidth || WIDTH); // units of the map in a pixel: points and labels keep their size
    svg.style.setProperty("--r", `${unit * Math.min(8, 4 + Math.log2(view.zoom))}px`);
    svg.style.setProperty("--unit", unit);
    for (const { node, from } of labels) node.classList.toggle("shown", from <= 1 / unit + 0.05);
    svg.classList.toggle("zoomed", view.zoom > 1);
  };
  const zoomAt = (factor, x, y) => { // the point (x, y) of the map stays where it is
    const zoom = Math.min(MOST, Math.max(1, view.zoom * factor)), by = view.zoom / zoom;
    view.x = x - (x - view.x) * by;
    view.y = y - (y - view.y) * by;
    view.zoom = zoom;
    show();
  };
  const middle = () => [view.x + WIDTH / view.zoom / 2, view.y + HEIGHT / view.zoom / 2];
  const focused = () => neurons.find((n) => n.node === document.activeElement);
  const zoomBy = (factor) => { const at = focused(); zoomAt(factor, ...(at ? [at.x, at.y] : middle())); };
  const all = () => { Object.assign(view, { x: 0, y: 0, zoom: 1 }); show(); };
  const placeOf = (event) => {
    const area = svg.getBoundingClientRect();
    return [view.x + (event.clientX - area.left) / area.width * WIDTH / view.zoom, view.y + (event.clientY - area.top) / area.height * HEIGHT / view.zoom];
  };

  // ---- details of a neuron ----
  let details = null, asked = null, current = null;
  const load = () => {
    asked ??= (async () => {
      const inside = document.getElementById("map-data");
      details = inside ? JSON.parse(inside.textContent) : await (await fetch(box.dataset.details)).json();
      if (current) describe(current);
    })().catch(() => { asked = null; });
  };
  const element = (tag, text, className) => { const made = document.createElement(tag); made.textContent = text; if (className) made.className = className; return made; };
  const excerptOf = (n) => {
    const line = element("p", "", "line");
    line.dir = "ltr";
    (details.excerpts[n.at] ?? []).forEach((word, i) => {
      const level = parseInt(details.levels[n.at][i], 16);
      const token = element("span", "", [level ? `l${level}` : "", i === details.peak[n.at] ? "peak" : ""].filter(Boolean).join(" "));
      for (const part of details.words[word].split(/([␣⏎⇥]+)/)) if (part) token.append(/^[␣⏎⇥]/.test(part) ? element("i", part) : part);
      line.append(token, document.createElement("wbr"));
    });
    return line;
  };
  const describe = (n) => {
    const head = element("p", "", "head"), address = n.node.getAttribute("href");
    head.append(address ? Object.assign(element("a", `neuron ${n.index}`), { href: address }) : element("b", `neuron ${n.index}`));
    if (details) {
      const score = details.score[n.at], family = details.family[n.at];
      head.append(element("span", `${score === null ? "no score" : `score ${score}`}${family ? ` · ${family}` : ""}`, "faint"));
      panel.replaceChildren(head, element("p", details.text[n.at] || "not explained", "text"));
      if (details.excerpts[n.at]?.length) panel.append(excerptOf(n));
    } else panel.replaceChildren(head, element("p", n.name, "text"));
  };
  const select = (n) => {
    if (current === n) return;
    current?.node.classList.remove("at");
    current = n;
    if (!n) return;
    n.node.classList.add("at");
    load();
    describe(n);
  };
  const nearest = (x, y, within) => {
    let best = null, least = within * within;
    for (const n of neurons) {
      const distance = (n.x - x) ** 2 + (n.y - y) ** 2;
      if (distance < least && !(svg.classList.contains("filtered") && !n.node.classList.contains("on"))) [best, least] = [n, distance];
    }
    return best;
  };

  // ---- pointer: hover, drag, pinch, wheel ----
  const pointers = new Map();
  let moved = false, active = false;
  const unit = () => WIDTH / view.zoom / (svg.clientWidth || WIDTH);
  svg.addEventListener("pointerdown", (event) => { active = true; moved = false; pointers.set(event.pointerId, [event.clientX, event.clientY]); });
  svg.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) { const n = nearest(...placeOf(event), 16 * unit()); if (n) select(n); return; }
    const dx = event.clientX - before[0], dy = event.clientY - before[1];
    if (!moved && Math.hypot(dx, dy) < 5) return;
    if (!moved) try { svg.setPointerCapture(event.pointerId); } catch { /* the pointer is already up */ }
    moved = true;
    const others = [...pointers].filter(([id]) => id !== event.pointerId);
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
    if (others.length) {
      const [ox, oy] = others[0][1];
      const factor = Math.hypot(event.clientX - ox, event.clientY - oy) / Math.max(1, Math.hypot(before[0] - ox, before[1] - oy));
      zoomAt(factor, ...placeOf({ clientX: (event.clientX + ox) / 2, clientY: (event.clientY + oy) / 2 }));
      return;
    }
    view.x -= dx * unit();
    view.y -= dy * unit();
    show();
  });
  for (const end of ["pointerup", "pointercancel", "pointerleave"]) svg.addEventListener(end, (event) => pointers.delete(event.pointerId));
  svg.addEventListener("click", (event) => { // a drag is no click; a click near a point is on it
    if (moved) { event.preventDefault(); moved = false; return; }
    const n = nearest(...placeOf(event), 16 * unit());
    if (!n) return;
    select(n);
    if (!event.target.closest(".n")) n.node.focus({ preventScroll: true });
  }, true);
  svg.addEventListener("dragstart", (event) => event.preventDefault());
  let hidden = 0;
  svg.addEventListener("wheel", (event) => {
    if (!active && !event.ctrlKey && !event.metaKey) { // the wheel scrolls the page until the map is used
      hint.textContent = "Click the map, or hold Ctrl, to zoom with the wheel";
      hint.hidden = false;
      clearTimeout(hidden);
      hidden = setTimeout(() => { hint.hidden = true; }, 1500);
      return;
    }
    event.preventDefault();
    zoomAt(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), ...placeOf(event));
  }, { passive: false });
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest("#mapbox")) active = false; });

  // ---- keys: one point is in the order of tabs, arrows move between points ----
  let stop = neurons.reduce((best, n) => (Math.hypot(n.x - WIDTH / 2, n.y - HEIGHT / 2) < Math.hypot(best.x - WIDTH / 2, best.y - HEIGHT / 2) ? n : best));
  stop.node.setAttribute("tabindex", "0");
  svg.addEventListener("focusin", (event) => {
    const n = neurons.find((one) => one.node === event.target.closest(".n"));
    if (!n) return;
    stop.node.setAttribute("tabindex", "-1");
    stop = n;
    n.node.setAttribute("tabindex", "0");
    active = true;
    select(n);
    const width = WIDTH / view.zoom, height = HEIGHT / view.zoom;
    if (n.x < view.x || n.x > view.x + width || n.y < view.y || n.y > view.y + height) {
      view.x = n.x - width / 2;
      view.y = n.y - height / 2;
      show();
    }
  });
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  svg.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const direction = arrows[event.key];
    if (direction && event.shiftKey) {
      view.x += direction[0] * WIDTH / view.zoom / 5;
      view.y += direction[1] * HEIGHT / view.zoom / 5;
      show();
    } else if (direction) {
      let best = null, least = Infinity;
      for (const n of neurons) {
        const along = (n.x - stop.x) * direction[0] + (n.y - stop.y) * direction[1];
        const across = Math.abs((n.x - stop.x) * direction[1]) + Math.abs((n.y - stop.y) * direction[0]);
        if (n !== stop && along > 0.1 && along + 2 * across < least && !(svg.classList.contains("filtered") && !n.node.classList.contains("on"))) [best, least] = [n, along + 2 * across];
      }
      best?.node.focus({ preventScroll: true });
    } else if (event.key === "+" || event.key === "=") zoomBy(1.5);
    else if (event.key === "-") zoomBy(1 / 1.5);
    else if (event.key === "0") all();
    else return;
    event.preventDefault();
  });

  // ---- buttons ----
  box.querySelector(".zoom").hidden = false;
  document.getElementById("zoom-in").addEventListener("click", () => zoomBy(1.6));
  document.getElementById("zoom-out").addEventListener("click", () => zoomBy(1 / 1.6));
  document.getElementById("zoom-all").addEventListener("click", all);

  // ---- groups: hover or focus shows one, a click holds it ----
  let held = null;
  const only = (group) => {
    svg.classList.toggle("filtered", group !== null);
    for (const { node } of neurons) node.classList.toggle("on", group !== null && node.classList.contains(`g${group}`));
  };
  for (const item of box.querySelectorAll(".legend li")) {
    const button = document.createElement("button"), group = item.dataset.group;
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.append(...item.childNodes);
    item.append(button);
    for (const enter of ["pointerenter", "focus"]) button.addEventListener(enter, () => only(group));
    for (const leave of ["pointerleave", "blur"]) button.addEventListener(leave, () => only(held));
    button.addEventListener("click", () => {
      held = held === group ? null : group;
      for (const other of box.querySelectorAll(".legend button")) other.setAttribute("aria-pressed", String(other.parentNode.dataset.group === held));
      only(held);
    });
  }
  panel.hidden = false;
  panel.replaceChildren(element("p", "Point at a neuron to read what it responds to. Keys: Tab to the map, arrows to move, Enter to open, + − 0 to zoom, Shift and arrows to pan.", "faint"));
  new ResizeObserver(show).observe(svg);
  show();
})();
