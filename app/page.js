// Links between pages without loading the page anew, and the tooltip of tokens. Text is only ever set as text.
export default function ({ parentElement }) {
  parentElement.sbEnd?.();
  const tip = document.createElement("div");
  tip.id = "sb-tip";
  document.body.appendChild(tip);

  const click = (event) => {
    const link = event.target.closest?.("a[data-go]");
    if (!link || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    hide();
    history.pushState(null, "", new URL(link.getAttribute("href"), location.href));
    dispatchEvent(new PopStateEvent("popstate")); // as the browser's own Back and Forward, which Streamlit follows
    scrollTo(0, 0);
  };
  const over = (event) => {
    const token = event.target.closest?.("[data-v]");
    if (!token) {
      tip.style.display = "none";
      return;
    }
    const place = token.closest("[data-d]");
    const line = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
    const lines = [line("b", token.textContent), line("span", `${token.closest("[data-n]")?.dataset.n ?? "activation"} ${token.dataset.v}`)];
    if (token.dataset.p) lines.push(line("span", `position ${token.dataset.p}`));
    if (place) lines.push(line("span", place.dataset.d));
    tip.replaceChildren(...lines);
    tip.style.display = "block";
    const box = token.getClientRects()[0], own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), innerWidth - own.width - 8);
    const above = box.top - own.height - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : box.bottom + 6}px`;
  };
  const hide = () => (tip.style.display = "none");

  document.addEventListener("click", click);
  document.addEventListener("mouseover", over);
  document.addEventListener("scroll", hide, true);
  parentElement.sbEnd = () => {
    document.removeEventListener("click", click);
    document.removeEventListener("mouseover", over);
    document.removeEventListener("scroll", hide, true);
    tip.remove();
  };
  return parentElement.sbEnd;
}
